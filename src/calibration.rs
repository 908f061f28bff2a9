//! Calibration samples on their way into the model: tokens, classes, positions, embeddings.
//!
//! A sample keeps its own positions through every layer; nothing is padded, and samples never see
//! each other. Raw text that is longer than the limit is cut into pieces, each a sequence of its
//! own; conversations are never cut.

use crate::dataset::{Content, ImageSource, Sample};
use crate::distributed::Communicator;
use crate::hidden_states::{HiddenState, Store};
use crate::model::ModelSource;
use crate::model::context::TokenContext;
use crate::model::vision::VisionTower;
use crate::pipeline::Observer;
use crate::processor::{Message, ModelInput, Processor, TokenClass};
use crate::shards::Shards;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use std::sync::Arc;
use std::time::Instant;

/// All samples of a run, and where their hidden states are kept.
#[derive(Debug)]
pub struct CalibrationSet {
    /// In the order in which they were chosen; a long text is several. Those of this rank, where there
    /// are several.
    pub samples: Vec<CalibrationSample>,
    /// All samples of the run, and which of them are summed up together.
    pub shards: Shards,
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
            shards: Shards::default(),
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
                index: sample.index,
                piece: sample.piece,
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
            shards: self.shards.clone(),
            store,
            seconds: self.seconds,
        })
    }

    /// A digest of everything that a layer will see of the samples, those of other ranks included.
    ///
    /// # Errors
    /// [`Error::Io`]; a tensor error; [`Error::Rank`].
    pub fn digest(&self, communicator: &dyn Communicator) -> Result<String> {
        let own = self.samples.iter().map(|sample| {
            let mut digest = blake3::Hasher::new();
            sample.add_to(&mut digest, &self.store)?;
            Ok((sample.index, digest.finalize().to_string()))
        });
        let own = own.collect::<Result<Vec<_>>>()?;
        let mut all = communicator.all_gather_value(&own)?.concat();
        all.sort();
        let mut digest = blake3::Hasher::new();
        for (_, sample) in all {
            digest.update(sample.as_bytes());
        }
        Ok(digest.finalize().to_string())
    }

    /// These samples as if there were no others, in one shard.
    #[must_use]
    pub fn by_itself(mut self) -> Self {
        (0..)
            .zip(&mut self.samples)
            .for_each(|(i, sample)| sample.index = i);
        let n_tokens = self.samples.iter().map(|sample| sample.classes.len());
        self.shards = Shards::cut(n_tokens.collect(), 1);
        self
    }

    /// How many sequences all ranks have together.
    pub fn n_sequences(&self) -> usize {
        self.shards.n_tokens().len()
    }
}

/// One sample, or a piece of one, ready for the first layer.
#[derive(Debug)]
pub struct CalibrationSample {
    /// Its place among all of the run.
    pub index: usize,
    /// Its place among the pieces of a longer text.
    pub piece: usize,
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
        let placed = inputs.into_iter().enumerate().map(|(piece, input)| {
            let placed = place(model, tower, &sample.origin, input, &store)?;
            Ok(CalibrationSample { piece, ..placed })
        });
        let placed = placed.collect::<Result<Vec<_>>>()?;
        Ok((placed, [encoded, began.elapsed().as_secs_f64() - encoded]))
    };
    let samples = samples.par_iter().map(one).collect::<Result<Vec<_>>>()?;
    let (samples, seconds): (Vec<_>, Vec<[f64; 2]>) = samples.into_iter().unzip();
    let seconds = seconds
        .iter()
        .fold([0.0; 2], |a, b| [a[0] + b[0], a[1] + b[1]]);
    let mut samples: Vec<CalibrationSample> = samples.into_iter().flatten().collect();
    (0..)
        .zip(&mut samples)
        .for_each(|(i, sample)| sample.index = i);
    let n_tokens = samples.iter().map(|sample| sample.classes.len());
    Ok(CalibrationSet {
        shards: Shards::cut(n_tokens.collect(), 1),
        samples,
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
        index: 0,
        piece: 0,
        origin: origin.to_owned(),
        context: model.context(&input, &model.positions(&input)?)?,
        embeddings: place(&embedded.rows)?,
        deepstack: deepstack.collect::<Result<_>>()?,
        classes: input.classes,
        input_ids: input.input_ids,
    })
}

/// Tokens of each sequence of each sample, as [`prepare`] will have them.
///
/// # Errors
/// As [`prepare`], the model's aside.
pub fn count_tokens(
    processor: &Processor,
    samples: &[&Sample],
    max_tokens: usize,
) -> Result<Vec<Vec<usize>>> {
    let one = |sample: &&Sample| {
        let inputs = encode(processor, sample, max_tokens)?.into_iter();
        Ok(inputs.map(|input| input.input_ids.len()).collect())
    };
    samples.par_iter().map(one).collect()
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
