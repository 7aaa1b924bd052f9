"""P12: frozen networks adapted by seeds around their layers, beside the methods of peft at equal parameters."""
