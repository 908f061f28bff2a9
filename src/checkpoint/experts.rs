//! Experts that a file keeps fused: all of a layer in one tensor, seen here as linears of their own.
//!
//! Files of Qwen3-VL-MoE hold for each layer
//! - `….experts.gate_up_proj` `[n_experts, in, 2·inter]`, gate's columns before up's;
//! - `….experts.down_proj` `[n_experts, inter, out]`;
//!
//! each expert's weights as `x·W` needs them, and files that transformers 5 saved hold the same
//! tensors turned, `[n_experts, 2·inter, in]` and `[n_experts, out, inter]`. The two shapes together
//! tell which. Loaders of quantized models know the experts one by one, as `….experts.3.gate_proj`, so
//! that is what a weight is called in plans, reports and exports, and
//! [`Checkpoint::linear_weight`] finds it in any form.

use super::{Checkpoint, DType, finite};
use crate::{Error, Matrix, Result};
use std::ops::Range;

const GATE_UP: &str = "gate_up_proj";
const DOWN: &str = "down_proj";

/// Where in a fused tensor the weight of one linear is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FusedWeight {
    /// Name of the tensor.
    pub tensor: String,
    /// Expert.
    pub expert: usize,
    /// Inputs of the linear.
    pub inp: usize,
    /// Outputs of all linears in the tensor.
    pub outputs: usize,
    /// Those of this linear.
    pub own: Range<usize>,
    /// Whether an expert's part is `[in, out]`, not `[out, in]`.
    pub inputs_first: bool,
    /// Type of the elements.
    pub dtype: DType,
}

impl FusedWeight {
    /// Shape `[out, in]` of the linear.
    pub fn shape(&self) -> [usize; 2] {
        [self.own.len(), self.inp]
    }
}

/// A layer's experts in two tensors.
struct Fused {
    n_experts: usize,
    hidden: usize,
    inter: usize,
    inputs_first: bool,
}

impl Checkpoint {
    /// The experts whose tensors begin with `prefix`, if they are fused.
    fn fused(&self, prefix: &str) -> Option<Fused> {
        if !prefix.ends_with(".experts") {
            return None;
        }
        let shape = |name| {
            let info = self.info(&format!("{prefix}.{name}"))?;
            // Empty tensors may claim any number of experts.
            let is_fused = info.shape.len() == 3 && info.n_bytes > 0;
            is_fused.then(|| [info.shape[0], info.shape[1], info.shape[2]])
        };
        let ([n_experts, a, b], [n_down, c, d]) = (shape(GATE_UP)?, shape(DOWN)?);
        let fused = |hidden, inter, inputs_first| Fused {
            n_experts,
            hidden,
            inter,
            inputs_first,
        };
        match n_experts == n_down {
            true if a == d && b / 2 == c && b % 2 == 0 => Some(fused(a, c, true)),
            true if b == c && a / 2 == d && a % 2 == 0 => Some(fused(b, d, false)),
            _ => None,
        }
    }

    /// Where the weight of `module` is, if it is an expert's in a fused tensor.
    pub fn fused_weight(&self, module: &str) -> Option<FusedWeight> {
        let (rest, role) = module.rsplit_once('.')?;
        let (prefix, expert) = rest.rsplit_once('.')?;
        let expert: usize = expert.parse().ok()?;
        let fused = self
            .fused(prefix)
            .filter(|fused| expert < fused.n_experts)?;
        let (hidden, inter) = (fused.hidden, fused.inter);
        let (name, inp, outputs, own) = match role {
            "gate_proj" => (GATE_UP, hidden, 2 * inter, 0..inter),
            "up_proj" => (GATE_UP, hidden, 2 * inter, inter..2 * inter),
            "down_proj" => (DOWN, inter, hidden, 0..hidden),
            _ => return None,
        };
        let tensor = format!("{prefix}.{name}");
        let dtype = self.info(&tensor)?.dtype;
        let inputs_first = fused.inputs_first;
        Some(FusedWeight {
            tensor,
            expert,
            inp,
            outputs,
            own,
            inputs_first,
            dtype,
        })
    }

    /// The linears whose weights a tensor holds: those of a fused one by expert, of another the one
    /// that its name says.
    pub fn modules_of(&self, tensor: &str) -> Vec<String> {
        let roles: &[&str] = match tensor.rsplit_once('.') {
            Some((_, GATE_UP)) => &["gate_proj", "up_proj"],
            Some((_, DOWN)) => &["down_proj"],
            _ => &[],
        };
        let prefix = tensor.rsplit_once('.').map_or("", |(prefix, _)| prefix);
        match self.fused(prefix).filter(|_| !roles.is_empty()) {
            Some(fused) => (0..fused.n_experts)
                .flat_map(|expert| roles.iter().map(move |role| (expert, role)))
                .map(|(expert, role)| format!("{prefix}.{expert}.{role}"))
                .collect(),
            None => tensor
                .strip_suffix(".weight")
                .map(str::to_owned)
                .into_iter()
                .collect(),
        }
    }

    /// The other tensor of the same experts, if `tensor` is a fused one: neither can be understood
    /// without it.
    pub fn fused_with(&self, tensor: &str) -> Option<String> {
        let (prefix, name) = tensor.rsplit_once('.')?;
        let other = match name {
            GATE_UP => DOWN,
            DOWN => GATE_UP,
            _ => return None,
        };
        self.fused(prefix).map(|_| format!("{prefix}.{other}"))
    }

    /// Type and shape `[out, in]` of a linear's plain weight, wherever it is; of a quantized one the
    /// type of its scales.
    pub fn linear_info(&self, module: &str) -> Option<(DType, Vec<usize>)> {
        if self.is_quantized(module) {
            return self.packed_info(module).ok();
        }
        match self.info(&format!("{module}.weight")) {
            Some(info) => Some((info.dtype, info.shape.clone())),
            None => {
                let fused = self.fused_weight(module)?;
                Some((fused.dtype, fused.shape().to_vec()))
            }
        }
    }

    /// Holds the shape of a linear's plain weight against `[out, in]`.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Shape`], naming the tensor.
    pub fn require_linear(&self, module: &str, shape: [usize; 2]) -> Result<()> {
        match self.fused_weight(module) {
            Some(fused) if fused.shape() == shape => Ok(()),
            Some(fused) => Err(Error::Shape {
                module: format!("{module} in {}", fused.tensor),
                expected: shape.to_vec(),
                found: fused.shape().to_vec(),
            }),
            None => {
                let weight = format!("{module}.weight");
                self.require_shape(&weight, &shape).map(|_| ())
            }
        }
    }

    /// The weight `[out, in]` of a linear, row-major, its elements as the file has them: of a fused
    /// one its part, in this order.
    ///
    /// # Errors
    /// As [`Checkpoint::bytes`].
    pub fn linear_bytes(&self, module: &str) -> Result<Vec<u8>> {
        let Some(fused) = self.fused_weight(module) else {
            return self.bytes(&format!("{module}.weight"));
        };
        let size = fused.dtype.n_bytes();
        let row_bytes = fused.inp * size;
        let start = fused.expert * fused.outputs * row_bytes;
        let part = match fused.inputs_first {
            true => 0..fused.outputs,
            false => fused.own.clone(),
        };
        let range = start + part.start * row_bytes..start + part.end * row_bytes;
        let found = self.bytes_at(&fused.tensor, range)?;
        // The expert and all shapes were held against the tensor's.
        let bytes = found.ok_or_else(|| self.tensor_error(&fused.tensor, "ends early"))?;
        if !fused.inputs_first {
            return Ok(bytes);
        }
        let mut turned = Vec::with_capacity(fused.own.len() * row_bytes);
        for output in fused.own.clone() {
            for input in 0..fused.inp {
                let at = (input * fused.outputs + output) * size;
                turned.extend_from_slice(&bytes[at..at + size]);
            }
        }
        Ok(turned)
    }

    pub(super) fn fused_matrix(&self, module: &str, out: usize, inp: usize) -> Result<Matrix> {
        self.require_linear(module, [out, inp])?;
        let bytes = self.linear_bytes(module)?;
        let dtype = self.fused_weight(module).map(|fused| fused.dtype);
        let values = dtype.and_then(|dtype| dtype.f32_from_bytes(&bytes));
        let values = values.ok_or_else(|| Error::Unsupported {
            what: format!("{module}: weights that are not BF16, F16, F32 or F64"),
        })?;
        Matrix::from_vec(module, out, inp, finite(module, values)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use std::collections::HashMap;
    use tempfile::TempDir;

    /// Two experts of three inputs, two gates beside two ups, in one of the two layouts.
    fn checkpoint(inputs_first: bool) -> (TempDir, Checkpoint) {
        let dir = tempfile::tempdir().unwrap();
        let values = |shape: &[usize]| {
            let n = shape.iter().product::<usize>() as f32;
            Tensor::arange(0f32, n, &Device::Cpu)
                .unwrap()
                .reshape(shape)
                .unwrap()
        };
        let laid = |t: Tensor| match inputs_first {
            true => t,
            false => t.transpose(1, 2).unwrap().contiguous().unwrap(),
        };
        let tensors = HashMap::from([
            ("l.experts.gate_up_proj", laid(values(&[2, 3, 4]))),
            ("l.experts.down_proj", laid(values(&[2, 2, 3]))),
            ("l.gate.weight", values(&[6, 4])),
        ]);
        candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        (dir, checkpoint)
    }

    #[test]
    fn experts_are_found_in_fused_tensors_of_both_layouts() {
        for inputs_first in [true, false] {
            let (_dir, checkpoint) = checkpoint(inputs_first);
            let weight = |module: &str, out, inp| checkpoint.linear_weight(module, out, inp);
            let up = weight("l.experts.1.up_proj", 2, 3).unwrap();
            assert_eq!(up.data(), [14.0, 18.0, 22.0, 15.0, 19.0, 23.0]);
            let down = weight("l.experts.0.down_proj", 3, 2).unwrap();
            assert_eq!(down.row(1), [1.0, 4.0]);
            for (module, out, inp) in [("l.experts.2.up_proj", 2, 3), ("l.experts.0.up_proj", 3, 2)]
            {
                assert!(weight(module, out, inp).is_err(), "{module}");
            }
        }
    }

    #[test]
    fn a_fused_tensor_holds_the_modules_of_all_experts() {
        let (_dir, checkpoint) = checkpoint(true);
        let names = checkpoint.modules_of("l.experts.gate_up_proj");
        let roles = ["0.gate_proj", "0.up_proj", "1.gate_proj", "1.up_proj"];
        assert_eq!(names, roles.map(|role| format!("l.experts.{role}")));
        assert_eq!(checkpoint.modules_of("l.gate.weight"), ["l.gate"]);
        assert!(checkpoint.modules_of("l.gate.bias").is_empty());
        let other = checkpoint.fused_with("l.experts.down_proj");
        assert_eq!(other.as_deref(), Some("l.experts.gate_up_proj"));
        assert_eq!(checkpoint.fused_with("l.gate.weight"), None);
    }
}
