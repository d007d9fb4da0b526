"""The compiled loops, one module for each CPU level; cbn.dispatch chooses among them."""
