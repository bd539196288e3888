"""Stop without validation data, when alpha no longer falls: python examples/stop_by_alpha.py [seed] [wrong].

An MLP learns 500 of scikit-learn's digits. It is trained on after the stop, to show what stopping got and lost.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from farms_tb import analyze

EPOCHS, PATIENCE, MIN_FALL = 100, 10, 0.01

seed, wrong_share = int(sys.argv[1]) if sys.argv[1:] else 0, float(sys.argv[2]) if sys.argv[2:] else 0.0
torch.manual_seed(seed)
digits = load_digits()
order = torch.randperm(len(digits.target))
images, labels = torch.tensor(digits.data).float()[order] / 16, torch.tensor(digits.target)[order]
own = torch.where(torch.rand(500) < wrong_share, torch.randint(10, (500,)), labels[:500])
net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

best, waited, stopped = float("inf"), 0, 0
for epoch in range(1, EPOCHS + 1):
    for batch in torch.randperm(500).split(32):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[batch]), own[batch]).backward()
        optimizer.step()
    accuracy = float((net(images[500:]).argmax(1) == labels[500:]).float().mean())
    if not stopped:
        alphas = list(analyze(net).alphas.values())
        mean = sum(alphas) / len(alphas)
        best, waited = (mean, 0) if mean < best - MIN_FALL else (best, waited + 1)
        if waited == PATIENCE:
            stopped = epoch
            print(f"stop after {epoch} of {EPOCHS} epochs: mean alpha {mean:.2f}, test accuracy {accuracy:.1%}")
print(f"trained on to epoch {EPOCHS}: test accuracy {accuracy:.1%}")
