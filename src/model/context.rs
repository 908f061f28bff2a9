//! What a decoder needs to know of a run of tokens besides their hidden states: where they stand,
//! which of them may see each other, and what the tower adds to them on the way.
//!
//! A sample keeps its own context through every layer; nothing here depends on other samples.

use crate::Result;
use crate::model::decoder_config::DecoderConfig;
use crate::model::rope::{PositionIds, Rope};
use candle_core::{Device, Tensor};

/// The side inputs of a run of tokens.
#[derive(Clone, Debug)]
pub struct TokenContext {
    global: Rope,
    local: Option<Rope>,
    /// For each token 0, or the number of the image that it is of, or of the prompt, from 1.
    groups: Vec<u32>,
    deepstack: Vec<Tensor>,
}

impl TokenContext {
    /// The context of tokens at `positions`, in the groups `groups` (0: in none) whose tokens may
    /// see each other.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory.
    pub fn new(
        config: &DecoderConfig,
        positions: &PositionIds,
        groups: Vec<u32>,
        device: &Device,
    ) -> Result<Self> {
        let rope = |rotary| Rope::of_decoder(rotary, config.head_dim, positions, device);
        Ok(Self {
            global: rope(&config.rotary)?,
            local: (config.local.as_ref())
                .map(|local| rope(&local.rotary))
                .transpose()?,
            groups,
            deepstack: Vec::new(),
        })
    }

    /// The same with what is added to the outputs of the first layers, `[n_tokens, hidden]` each.
    #[must_use]
    pub fn with_deepstack(mut self, deepstack: Vec<Tensor>) -> Self {
        self.deepstack = deepstack;
        self
    }

    /// What is added to the output of a layer.
    pub fn deepstack(&self, layer_idx: usize) -> Option<&Tensor> {
        self.deepstack.get(layer_idx)
    }

    /// For each token the number of its group, 0 for none.
    pub fn groups(&self) -> &[u32] {
        &self.groups
    }

    /// The angles for a layer, by whether it has a window.
    pub fn rope(&self, is_local: bool) -> &Rope {
        let local = self.local.as_ref().filter(|_| is_local);
        local.unwrap_or(&self.global)
    }

    /// All tables of angles.
    pub fn ropes(&self) -> impl Iterator<Item = &Rope> {
        std::iter::once(&self.global).chain(&self.local)
    }

    /// The context of tokens `start..start + len`.
    ///
    /// # Errors
    /// A tensor error if the range is not inside.
    pub fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        let local = self.local.as_ref().map(|rope| rope.narrow(start, len));
        let deepstack = self.deepstack.iter().map(|x| x.narrow(0, start, len));
        Ok(Self {
            global: self.global.narrow(start, len)?,
            local: local.transpose()?,
            groups: self.groups[start..start + len].to_vec(),
            deepstack: deepstack.collect::<candle_core::Result<_>>()?,
        })
    }

    /// Several runs of tokens, one after the other.
    ///
    /// # Errors
    /// A tensor error if there are none, or they are of different models.
    pub fn cat(parts: &[Self]) -> Result<Self> {
        let ropes = |part: fn(&Self) -> Option<&Rope>| -> Result<Option<Rope>> {
            let found: Option<Vec<Rope>> = parts.iter().map(|p| part(p).cloned()).collect();
            found.map(|ropes| Rope::cat(&ropes)).transpose()
        };
        let n_levels = parts.iter().map(|p| p.deepstack.len()).min().unwrap_or(0);
        let level = |i: usize| {
            let rows: Vec<&Tensor> = parts.iter().map(|p| &p.deepstack[i]).collect();
            Tensor::cat(&rows, 0)
        };
        let globals: Vec<Rope> = parts.iter().map(|p| p.global.clone()).collect();
        Ok(Self {
            global: Rope::cat(&globals)?,
            local: ropes(|part| part.local.as_ref())?,
            groups: parts.iter().flat_map(|p| p.groups.clone()).collect(),
            deepstack: (0..n_levels)
                .map(level)
                .collect::<candle_core::Result<_>>()?,
        })
    }
}
