"""Tables and queries, and the engines that run them."""
