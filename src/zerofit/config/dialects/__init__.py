"""Other tools' configurations, read into zerofit's own keys: DeepSpeed JSON, nanoGPT files, older YAML, familiar names.

Nothing is dropped in silence: each foreign key leaves a `Note` that says what became of it.
"""
