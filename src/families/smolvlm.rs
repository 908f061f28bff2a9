//! SmolVLM, whose later releases have a name of their own: all of Idefics3, with marks around an
//! image that the tokenizer may rename.

use super::{Family, idefics3};
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::model::architecture::Architecture;
use crate::processor::idefics3::{Preprocessor, PromptTokens};
use crate::processor::{ImageProcessor, ImageSettings};

/// SmolVLM.
pub const FAMILY: Family = Family {
    model_type: "smolvlm",
    name: "SmolVLM",
    architecture,
    images,
};

fn architecture(checkpoint: &Checkpoint) -> Result<Architecture> {
    idefics3::architecture_of(checkpoint, FAMILY.model_type)
}

fn images(settings: &ImageSettings) -> Result<Box<dyn ImageProcessor>> {
    let tokens = PromptTokens::read(settings);
    Ok(Box::new(Preprocessor::open(settings, tokens)?))
}
