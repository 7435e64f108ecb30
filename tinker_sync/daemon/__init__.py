"""The service: its schedule, its signals, and what it tells the service manager. What is done is `passes`' business."""
