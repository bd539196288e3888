"""Networks of the recipes: UNet, ResNet and VGG for small images; FNO comes from neuraloperator."""
