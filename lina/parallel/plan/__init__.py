"""What a step costs on this machine, and the schedule that costs least: lines, predictions, decisions.

The arithmetic is compiled (csrc/plan); here are its inputs, files and names.
"""
