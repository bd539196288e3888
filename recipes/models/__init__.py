"""Networks of the recipes: UNet, ResNet and VGG for small images, LLaMA on bytes; FNO is neuraloperator's."""
