"""What a step costs: counted, measured, and compared with what the machine can do."""
