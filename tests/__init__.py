"""The tests: behaviour, against the real thing or the bundled local server; nothing leaves loopback."""
