//! Calibration samples on their way into the model: tokens, classes, positions, embeddings.
//!
//! A sample keeps its own positions through every layer; nothing is padded, and samples never see
//! each other.

use crate::dataset::Sample;
use crate::model::qwen2_vl::Qwen2Vl;
use crate::model::rope::Rope;
use crate::model::vision::qwen2::VisionTower;
use crate::pipeline::Observer;
use crate::processor::{ModelInput, Processor, TokenClass};
use crate::{Error, Result};
use candle_core::Tensor;
use rayon::prelude::*;
use std::sync::Arc;

/// One sample ready for the first layer.
#[derive(Clone, Debug)]
pub struct CalibrationSample {
    /// One class per token.
    pub classes: Vec<TokenClass>,
    /// Rotary tables of its tokens.
    pub rope: Rope,
    /// `[n_tokens, hidden]`, image features in their places.
    pub embeddings: Tensor,
}

impl CalibrationSample {
    /// Adds everything that a layer will see of the sample to a digest.
    ///
    /// # Errors
    /// A tensor error.
    pub fn add_to(&self, digest: &mut blake3::Hasher) -> Result<()> {
        digest.update(&(self.classes.len() as u64).to_le_bytes());
        let classes: Vec<u8> = self.classes.iter().map(|class| *class as u8).collect();
        digest.update(&classes);
        for tensor in self.rope.tables().into_iter().chain([&self.embeddings]) {
            for value in tensor.flatten_all()?.to_vec1::<f32>()? {
                digest.update(&value.to_le_bytes());
            }
        }
        Ok(())
    }
}

/// Brings samples to the first layer: images read and cut into patches, text tokenized and
/// classed, image features computed and put in their places. A sample's patches, which may be
/// larger than everything that follows, are gone before the next one's are made.
///
/// # Errors
/// [`Error::Interrupted`] if the observer says so; [`Error::Missing`] for a sample without an
/// image; else the reader's, the processor's or the model's error.
pub fn prepare(
    model: &Qwen2Vl,
    tower: &VisionTower,
    processor: &Processor,
    samples: &[&Sample],
    observer: &dyn Observer,
) -> Result<Vec<CalibrationSample>> {
    let one = |sample: &&Sample| {
        if observer.is_cancelled() {
            return Err(Error::Interrupted);
        }
        let input = encode(processor, sample)?;
        let features = input.images.iter().map(|image| tower.forward(image));
        let features = features.collect::<Result<Vec<_>>>()?;
        Ok(CalibrationSample {
            rope: model.rope(&model.positions(&input)?)?,
            embeddings: model.embed(&input.input_ids, &features)?,
            classes: input.classes,
        })
    };
    samples.par_iter().map(one).collect()
}

/// Tokens of each sample, as [`prepare`] will have them.
///
/// # Errors
/// As [`prepare`], the model's aside.
pub fn count_tokens(processor: &Processor, samples: &[&Sample]) -> Result<Vec<usize>> {
    let one = |sample: &&Sample| Ok(encode(processor, sample)?.input_ids.len());
    samples.par_iter().map(one).collect()
}

fn encode(processor: &Processor, sample: &Sample) -> Result<ModelInput> {
    if sample.images.is_empty() {
        return Err(Error::Missing {
            what: "image".into(),
            place: format!("calibration sample {}", sample.origin),
        });
    }
    let images = sample.images.iter().map(|source| {
        let image = source.load()?;
        processor.vision_input(&image).map(Arc::new)
    });
    let images = images.collect::<Result<Vec<_>>>()?;
    processor.encode_conversation(&sample.messages, &images)
}
