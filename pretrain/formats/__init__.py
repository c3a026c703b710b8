"""Other software's formats, to and from, each with its proof."""
