"""Measure and balance the layers in a loop of your own: python examples/plain_loop.py."""

import torch
from torch import nn

from farms_tb import TempBalance

if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    images, labels = torch.randn(64, 3, 16, 16), torch.randint(10, (64,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)

    balancer = TempBalance(model, optimizer, exclude_first=False)  # measures, and balances from here on
    for epoch in range(3):
        for batch in range(4):
            part = slice(16 * batch, 16 * (batch + 1))
            loss = nn.functional.cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        balancer.step()  # measures again: once an epoch is plenty
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    print(balancer.report)
    for group in balancer.param_groups(optimizer):  # what the optimizer really steps with
        print(group.layers, f"ratio {group.ratio:.2f}")
