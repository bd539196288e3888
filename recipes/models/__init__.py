"""Networks of the recipes, a module for each kind; the FNO is neuraloperator's."""
