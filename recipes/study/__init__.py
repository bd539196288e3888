"""Does layer-wise balancing help on a task? Several arms, paired by seed, each with its tuned learning rate."""
