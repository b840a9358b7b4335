"""What people see of a run: console, metrics, the HTML page."""
