"""The network side of a coordinator: the Fleet API that sites connect to, and the Grid on top of it."""
