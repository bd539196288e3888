"""Data made or found on the spot: Darcy flow, scikit-learn's digits, torchvision's CIFAR."""
