"""Made examples of tasks, and the metrics of answers."""
