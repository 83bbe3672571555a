"""MiniCPM-V 2.5 to 4.5 and MiniCPM-o 2.6 and 4.5, built from transformers' blocks; names are the checkpoints' own."""
