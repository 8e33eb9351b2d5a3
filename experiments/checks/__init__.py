"""Scripts that check the robustness of the tool: fuzzing and crashes."""
