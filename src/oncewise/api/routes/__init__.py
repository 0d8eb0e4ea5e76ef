"""One module per group of routes. The hot ones are `oncewise.api.messages` and `oncewise.api.streams`."""
