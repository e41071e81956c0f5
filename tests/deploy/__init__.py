"""What operators are given: the page about metrics, alerts, the dashboard, the container and its cluster."""
