"""Files, object stores and the formats that both are written in: nothing here knows of models or data."""
