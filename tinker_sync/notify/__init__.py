"""Telling others: programs that run after events, notifications, a heartbeat. Nothing here can hurt the work."""
