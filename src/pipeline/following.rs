//! Finished layers, told by rank 0, which alone keeps them, to the others.

use super::share::Form;
use super::{FinishedLayer, LayerOutcome, LayerSink};
use crate::distributed::Communicator;
use crate::distributed::message::{Message, Received};
use crate::model::changed::ChangedTensor;
use crate::model::source::Module;
use crate::{QuantizedWeight, Result};
use serde::{Deserialize, Serialize};

/// What is told of a layer that an earlier run finished, its numbers aside.
#[derive(Serialize, Deserialize)]
struct Finished {
    weights: Vec<(String, Form)>,
    tensors: Vec<(String, usize)>,
    outcome: LayerOutcome,
}

/// Rank 0's sink: the others hear of what is there of each layer before it is begun.
pub(super) struct Leading<'a> {
    pub(super) sink: &'a mut dyn LayerSink,
    pub(super) communicator: &'a dyn Communicator,
}

impl LayerSink for Leading<'_> {
    fn finished(&mut self, layer_idx: usize) -> Result<Option<FinishedLayer>> {
        let layer = self.sink.finished(layer_idx)?;
        if !self.communicator.is_alone() {
            self.communicator.broadcast(message(layer.as_ref()))?;
        }
        Ok(layer)
    }

    fn kept_samples(&self) -> Option<Vec<usize>> {
        self.sink.kept_samples()
    }

    fn module(&mut self, module: &Module, weight: &QuantizedWeight) -> Result<()> {
        self.sink.module(module, weight)
    }

    fn tensor(&mut self, tensor: &ChangedTensor) -> Result<()> {
        self.sink.tensor(tensor)
    }

    fn layer(&mut self, layer_idx: usize, outcome: &LayerOutcome) -> Result<()> {
        self.sink.layer(layer_idx, outcome)
    }
}

/// The sink of any other rank: keeps nothing.
pub(super) struct Following<'a> {
    pub(super) kept_samples: Option<Vec<usize>>,
    pub(super) communicator: &'a dyn Communicator,
}

impl LayerSink for Following<'_> {
    fn finished(&mut self, _: usize) -> Result<Option<FinishedLayer>> {
        read(&self.communicator.broadcast(Vec::new())?)
    }

    fn kept_samples(&self) -> Option<Vec<usize>> {
        self.kept_samples.clone()
    }

    fn module(&mut self, _: &Module, _: &QuantizedWeight) -> Result<()> {
        Ok(())
    }

    fn tensor(&mut self, _: &ChangedTensor) -> Result<()> {
        Ok(())
    }
}

fn message(layer: Option<&FinishedLayer>) -> Vec<u8> {
    let told = layer.map(|layer| {
        let weights = layer.weights.iter();
        let tensors = layer.tensors.iter();
        Finished {
            weights: weights.map(|(n, w)| (n.clone(), Form::of(w))).collect(),
            tensors: tensors.map(|(n, v)| (n.clone(), v.len())).collect(),
            outcome: layer.outcome.clone(),
        }
    });
    let mut message = Message::new(&told);
    if let Some(layer) = layer {
        let weights = layer.weights.iter();
        weights.for_each(|(_, weight)| Form::put(&mut message, weight));
        layer.tensors.iter().for_each(|(_, v)| message.f32s(v));
    }
    message.into_bytes()
}

fn read(bytes: &[u8]) -> Result<Option<FinishedLayer>> {
    let (told, mut rest): (Option<Finished>, _) = Received::open(0, bytes)?;
    let Some(told) = told else {
        return rest.end().map(|()| None);
    };
    let mut weights = Vec::new();
    for (name, form) in told.weights {
        let weight = form.take(&name, &mut rest)?;
        weights.push((name, weight));
    }
    let mut tensors = Vec::new();
    for (name, len) in told.tensors {
        tensors.push((name, rest.f32s(len)?));
    }
    rest.end()?;
    Ok(Some(FinishedLayer {
        weights,
        tensors,
        outcome: told.outcome,
    }))
}
