//! Calibration samples on their way into the model: tokens, classes, positions, embeddings.
//!
//! A sample keeps its own positions through every layer; nothing is padded, and samples never see
//! each other. Raw text that is longer than the limit is cut into pieces, each a sequence of its
//! own; conversations are never cut.

use crate::dataset::{Content, ImageSource, Sample};
use crate::hidden_states::{HiddenState, Store};
use crate::model::ModelSource;
use crate::model::context::TokenContext;
use crate::model::vision::VisionTower;
use crate::pipeline::Observer;
use crate::processor::{Message, ModelInput, Processor, TokenClass};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use std::sync::Arc;
use std::time::Instant;

/// All samples of a run, and where their hidden states are kept.
#[derive(Debug)]
pub struct CalibrationSet {
    /// In the order in which they were chosen; a long text is several.
    pub samples: Vec<CalibrationSample>,
    /// Holds their embeddings, and what becomes of them.
    pub store: Store,
    /// Seconds that images and text took, and that the vision tower took; of all threads together.
    pub seconds: [f64; 2],
}

impl CalibrationSet {
    /// No samples, for a method that needs none.
    pub fn none() -> Self {
        Self {
            samples: Vec::new(),
            store: Store::in_memory(&Device::Cpu),
            seconds: [0.0; 2],
        }
    }

    /// The same samples once more, in memory: a run uses its set up.
    ///
    /// # Errors
    /// [`Error::Io`] if states lie in a file that cannot be read.
    pub fn copied(&self) -> Result<Self> {
        self.moved_to(Store::in_memory(self.store.device()))
    }

    /// The same samples once more, in another store.
    ///
    /// # Errors
    /// As [`CalibrationSet::copied`].
    pub(crate) fn moved_to(&self, store: Store) -> Result<Self> {
        let copied = |state: &HiddenState| {
            let mut copy = store.place(state.n_rows(), state.width())?;
            copy.set(&store, 0, &state.all(&self.store)?)?;
            Ok(copy)
        };
        let samples = self.samples.iter().map(|sample| {
            let deepstack = sample.deepstack.iter().map(&copied);
            Ok(CalibrationSample {
                origin: sample.origin.clone(),
                input_ids: sample.input_ids.clone(),
                classes: sample.classes.clone(),
                context: sample.context.clone(),
                embeddings: copied(&sample.embeddings)?,
                deepstack: deepstack.collect::<Result<_>>()?,
            })
        });
        Ok(Self {
            samples: samples.collect::<Result<_>>()?,
            store,
            seconds: self.seconds,
        })
    }

    /// A digest of everything that a layer will see of the samples.
    ///
    /// # Errors
    /// [`Error::Io`]; a tensor error.
    pub fn digest(&self) -> Result<String> {
        let mut digest = blake3::Hasher::new();
        for sample in &self.samples {
            sample.add_to(&mut digest, &self.store)?;
        }
        Ok(digest.finalize().to_string())
    }
}

/// One sample, or a piece of one, ready for the first layer.
#[derive(Debug)]
pub struct CalibrationSample {
    /// File and line or row, for messages.
    pub origin: String,
    /// Token ids, those of images included.
    pub input_ids: Vec<u32>,
    /// One class per token.
    pub classes: Vec<TokenClass>,
    /// Where its tokens stand.
    pub context: TokenContext,
    /// `[n_tokens, hidden]`, image features in their places.
    pub embeddings: HiddenState,
    /// What the tower adds to the outputs of the first layers, `[n_tokens, hidden]` each.
    pub deepstack: Vec<HiddenState>,
}

impl CalibrationSample {
    fn add_to(&self, digest: &mut blake3::Hasher, store: &Store) -> Result<()> {
        digest.update(&(self.classes.len() as u64).to_le_bytes());
        let classes: Vec<u8> = self.classes.iter().map(|class| *class as u8).collect();
        digest.update(&classes);
        for id in &self.input_ids {
            digest.update(&id.to_le_bytes());
        }
        for group in self.context.groups() {
            digest.update(&group.to_le_bytes());
        }
        let states = [&self.embeddings].into_iter().chain(&self.deepstack);
        let states = states.map(|state| state.all(store));
        let states: Vec<Tensor> = states.collect::<Result<_>>()?;
        let tables = self.context.ropes().flat_map(|rope| rope.tables());
        for tensor in tables.chain(&states) {
            for value in tensor.flatten_all()?.to_vec1::<f32>()? {
                digest.update(&value.to_le_bytes());
            }
        }
        Ok(())
    }
}

/// Brings samples to the first layer: images read and cut into patches, text tokenized and
/// classed, image features computed and put in their places. Raw texts are cut into pieces of at
/// most `max_tokens`. A sample's patches, which may be larger than everything that follows, are
/// gone before the next one's are made.
///
/// # Errors
/// [`Error::Interrupted`] if the observer says so; else the reader's, the processor's or the
/// model's error.
pub fn prepare(
    model: &ModelSource,
    tower: &dyn VisionTower,
    processor: &Processor,
    samples: &[&Sample],
    max_tokens: usize,
    store: Store,
    observer: &dyn Observer,
) -> Result<CalibrationSet> {
    let one = |sample: &&Sample| {
        if observer.is_cancelled() {
            return Err(Error::Interrupted);
        }
        let began = Instant::now();
        let inputs = encode(processor, sample, max_tokens)?;
        let encoded = began.elapsed().as_secs_f64();
        let placed = inputs
            .into_iter()
            .map(|input| place(model, tower, &sample.origin, input, &store));
        let placed = placed.collect::<Result<Vec<_>>>()?;
        Ok((placed, [encoded, began.elapsed().as_secs_f64() - encoded]))
    };
    let samples = samples.par_iter().map(one).collect::<Result<Vec<_>>>()?;
    let (samples, seconds): (Vec<_>, Vec<[f64; 2]>) = samples.into_iter().unzip();
    let seconds = seconds
        .iter()
        .fold([0.0; 2], |a, b| [a[0] + b[0], a[1] + b[1]]);
    Ok(CalibrationSet {
        samples: samples.into_iter().flatten().collect(),
        store,
        seconds,
    })
}

/// One input with its embeddings in the store.
fn place(
    model: &ModelSource,
    tower: &dyn VisionTower,
    origin: &str,
    input: ModelInput,
    store: &Store,
) -> Result<CalibrationSample> {
    let features = input.images.iter().map(|image| tower.forward(image));
    let features = features.collect::<Result<Vec<_>>>()?;
    let embedded = model.embed(&input.input_ids, &features)?;
    let place = |rows: &Tensor| -> Result<HiddenState> {
        let (n_tokens, hidden) = rows.dims2()?;
        let mut state = store.place(n_tokens, hidden)?;
        state.set(store, 0, rows)?;
        Ok(state)
    };
    let deepstack = embedded.deepstack.iter().map(place);
    Ok(CalibrationSample {
        origin: origin.to_owned(),
        context: model.context(&input, &model.positions(&input)?)?,
        embeddings: place(&embedded.rows)?,
        deepstack: deepstack.collect::<Result<_>>()?,
        classes: input.classes,
        input_ids: input.input_ids,
    })
}

/// Tokens of each sequence, as [`prepare`] will have them.
///
/// # Errors
/// As [`prepare`], the model's aside.
pub fn count_tokens(
    processor: &Processor,
    samples: &[&Sample],
    max_tokens: usize,
) -> Result<Vec<usize>> {
    let one = |sample: &&Sample| {
        let inputs = encode(processor, sample, max_tokens)?.into_iter();
        Ok(inputs.map(|input| input.input_ids.len()).collect())
    };
    let counts = samples
        .par_iter()
        .map(one)
        .collect::<Result<Vec<Vec<_>>>>()?;
    Ok(counts.concat())
}

/// The sequences of a sample.
pub(crate) fn encode(
    processor: &Processor,
    sample: &Sample,
    max_tokens: usize,
) -> Result<Vec<ModelInput>> {
    match &sample.content {
        Content::Text(text) => processor.encode_pieces(text, &sample.origin, max_tokens),
        Content::Chat { messages, images } => Ok(vec![encode_chat(processor, messages, images)?]),
    }
}

fn encode_chat(
    processor: &Processor,
    messages: &[Message],
    sources: &[ImageSource],
) -> Result<ModelInput> {
    let images = sources.iter().map(|source| {
        let image = source.load()?;
        processor.vision_input(&image, sources.len()).map(Arc::new)
    });
    let images = images.collect::<Result<Vec<_>>>()?;
    processor.encode_conversation(messages, &images)
}
