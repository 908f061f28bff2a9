//! Inputs of `down_proj`, the widest states of a layer: kept with the streams, or made again of the
//! residual stream whenever they are wanted. Either way they are made batch by batch, by the same
//! products of the same numbers, so that no bit depends on it.

use super::streams::{BothLayers, Piece, Sample, gather_full, gather_tensor};
use crate::Result;
use crate::hidden_states::Store;
use candle_core::Tensor;
use std::ops::Range;

/// Those of the tokens of a piece, `[n_tokens, in]`.
pub(super) struct DownInputs {
    /// U.
    pub(super) quantized: Tensor,
    /// F, where it is followed.
    pub(super) full: Option<Tensor>,
}

impl DownInputs {
    /// Kept or made again.
    pub(super) fn of(
        batch: &[Sample],
        piece: &Piece,
        store: &Store,
        layers: BothLayers<'_>,
    ) -> Result<Self> {
        match store.keeps_down_inputs() {
            true => Self::kept(batch, piece, store),
            false => Self::made(batch, piece, store, layers),
        }
    }

    /// From where they are kept.
    pub(super) fn kept(batch: &[Sample], piece: &Piece, store: &Store) -> Result<Self> {
        let full = || gather_full(batch, piece, store, |f| &f.input);
        Ok(Self {
            quantized: gather_tensor(batch, piece, store, |s| &s.input)?,
            full: batch[0].full.is_some().then(full).transpose()?,
        })
    }

    /// Of the residual stream after attention. Both layers hold gate and up.
    pub(super) fn made(
        batch: &[Sample],
        piece: &Piece,
        store: &Store,
        BothLayers { full, quantized }: BothLayers<'_>,
    ) -> Result<Self> {
        let y = gather_tensor(batch, piece, store, |s| &s.residual)?;
        let of_full = || -> Result<Tensor> {
            let y = gather_full(batch, piece, store, |f| &f.y)?;
            full.down_input(&full.gate_up_input(&y)?)
        };
        Ok(Self {
            quantized: quantized.down_input(&quantized.gate_up_input(&y)?)?,
            full: batch[0].full.is_some().then(of_full).transpose()?,
        })
    }

    /// Those of some of the tokens.
    pub(super) fn rows(&self, rows: &Range<usize>) -> Result<Self> {
        let part = |all: &Tensor| all.narrow(0, rows.start, rows.len());
        Ok(Self {
            quantized: part(&self.quantized)?,
            full: self.full.as_ref().map(part).transpose()?,
        })
    }
}
