"""The ledger: a projection of meter logs that answers questions and can be made again from them."""
