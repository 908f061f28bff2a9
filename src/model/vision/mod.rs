//! Vision towers: from the patches of an image to the embeddings that stand in the prompt.

pub mod qwen2;
