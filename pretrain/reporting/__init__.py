"""Pages for people: what a run did, what a model makes of a text."""
