"""The `language_model` engine's parts: the decoder, its attention flavours, its number formats, and the file writer."""
