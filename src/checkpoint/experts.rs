//! Experts that a file keeps fused: all of a layer in one tensor, seen here as linears of their own.
//!
//! Files of Qwen3-VL-MoE hold for each layer
//! - `….experts.gate_up_proj` `[n_experts, in, 2·inter]`, gate's columns before up's;
//! - `….experts.down_proj` `[n_experts, inter, out]`;
//!
//! each expert's weights transposed, as `x·W` needs them. Loaders of quantized models know the
//! experts one by one, as `….experts.3.gate_proj`, so that is what a weight is called in plans,
//! reports and exports, and [`Checkpoint::linear_weight`] finds it in either form.

use super::{Checkpoint, DType, TensorInfo};
use crate::{Error, Matrix, Result};
use std::ops::Range;

/// Where in a fused tensor the weight of one linear is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FusedWeight {
    /// Name of the tensor.
    pub tensor: String,
    /// Expert.
    pub expert: usize,
    /// Inputs: rows of an expert's part.
    pub inp: usize,
    /// Columns of an expert's part, all linears together.
    pub columns: usize,
    /// Those of this linear.
    pub own: Range<usize>,
    /// Type of the elements.
    pub dtype: DType,
}

impl FusedWeight {
    /// Shape `[out, in]` of the linear.
    pub fn shape(&self) -> [usize; 2] {
        [self.own.len(), self.inp]
    }
}

impl Checkpoint {
    /// Where the weight of `module` is, if it is an expert's in a fused tensor.
    pub fn fused_weight(&self, module: &str) -> Option<FusedWeight> {
        let (rest, role) = module.rsplit_once('.')?;
        let (experts, expert) = rest.rsplit_once('.')?;
        let expert = expert.parse().ok()?;
        let (fused, part, n_parts) = match role {
            "gate_proj" => ("gate_up_proj", 0, 2),
            "up_proj" => ("gate_up_proj", 1, 2),
            "down_proj" => ("down_proj", 0, 1),
            _ => return None,
        };
        let tensor = format!("{experts}.{fused}");
        let info = self
            .info(&tensor)
            .filter(|_| experts.ends_with(".experts"))?;
        let [n_experts, inp, columns] = info.shape[..] else {
            return None;
        };
        let width = columns / n_parts;
        (expert < n_experts && columns % n_parts == 0).then_some(FusedWeight {
            tensor,
            expert,
            inp,
            columns,
            own: part * width..(part + 1) * width,
            dtype: info.dtype,
        })
    }

    /// The linears whose weights a tensor holds: those of a fused one by expert, of another the one
    /// that its name says.
    pub fn modules_of(&self, tensor: &str) -> Vec<String> {
        let fused = tensor.rsplit_once('.').zip(self.info(tensor));
        let fused = fused.filter(|((experts, _), _)| experts.ends_with(".experts"));
        let roles: &[&str] = match fused {
            Some(((_, "gate_up_proj"), info)) if is_fused(info) => &["gate_proj", "up_proj"],
            Some(((_, "down_proj"), info)) if is_fused(info) => &["down_proj"],
            _ => {
                return tensor
                    .strip_suffix(".weight")
                    .map(str::to_owned)
                    .into_iter()
                    .collect();
            }
        };
        let (prefix, n_experts) = fused.map_or(("", 0), |((p, _), info)| (p, info.shape[0]));
        let of_expert = |expert| {
            let name = move |role: &&str| format!("{prefix}.{expert}.{role}");
            roles.iter().map(name)
        };
        (0..n_experts).flat_map(of_expert).collect()
    }

    /// Type and shape `[out, in]` of a linear's plain weight, wherever it is.
    pub fn linear_info(&self, module: &str) -> Option<(DType, Vec<usize>)> {
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
            None => self
                .require_shape(&format!("{module}.weight"), &shape)
                .map(|_| ()),
        }
    }

    /// The weight `[out, in]` of a linear as the file has it, row-major: of a fused one its part,
    /// turned and with the other linears' columns left out.
    ///
    /// # Errors
    /// As [`Checkpoint::bytes`].
    pub fn linear_bytes(&self, module: &str) -> Result<Vec<u8>> {
        let Some(fused) = self.fused_weight(module) else {
            return self.bytes(&format!("{module}.weight"));
        };
        let size = fused.dtype.n_bytes();
        let n_bytes = fused.inp * fused.columns * size;
        let start = fused.expert * n_bytes;
        let found = self.bytes_at(&fused.tensor, start..start + n_bytes)?;
        // Expert and shape were held against the tensor's.
        let bytes = found.ok_or_else(|| self.tensor_error(&fused.tensor, "ends early"))?;
        let [out, inp] = fused.shape();
        let mut turned = Vec::with_capacity(out * inp * size);
        for column in fused.own.clone() {
            for row in 0..inp {
                let at = (row * fused.columns + column) * size;
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
        let count = values.iter().filter(|v| !v.is_finite()).count();
        if count > 0 {
            return Err(Error::NotFinite {
                module: module.to_owned(),
                stage: "weights".into(),
                count,
            });
        }
        Matrix::from_vec(module, out, inp, values)
    }
}

fn is_fused(info: &TensorInfo) -> bool {
    // Empty tensors may claim any number of experts.
    info.shape.len() == 3 && info.n_bytes > 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use std::collections::HashMap;

    #[test]
    fn experts_are_found_in_fused_tensors() {
        let dir = tempfile::tempdir().unwrap();
        let gate_up = Tensor::arange(0f32, 24.0, &Device::Cpu).unwrap();
        let tensors = HashMap::from([
            // Two experts of three inputs and two gates beside two ups.
            (
                "l.experts.gate_up_proj",
                gate_up.reshape((2, 3, 4)).unwrap(),
            ),
            ("l.experts.down_proj", gate_up.reshape((2, 2, 6)).unwrap()),
            ("l.gate.weight", gate_up.reshape((6, 4)).unwrap()),
        ]);
        candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let up = checkpoint
            .linear_weight("l.experts.1.up_proj", 2, 3)
            .unwrap();
        assert_eq!(up.data(), [14.0, 18.0, 22.0, 15.0, 19.0, 23.0]);
        let down = checkpoint
            .linear_weight("l.experts.0.down_proj", 6, 2)
            .unwrap();
        assert_eq!(down.row(1), [1.0, 7.0]);
        let names = checkpoint.modules_of("l.experts.gate_up_proj");
        let roles = ["0.gate_proj", "0.up_proj", "1.gate_proj", "1.up_proj"];
        assert_eq!(names, roles.map(|role| format!("l.experts.{role}")));
        assert_eq!(checkpoint.modules_of("l.gate.weight"), ["l.gate"]);
        for (module, shape) in [
            ("l.experts.2.up_proj", [2, 3]),
            ("l.experts.0.up_proj", [3, 2]),
        ] {
            assert!(
                checkpoint
                    .linear_weight(module, shape[0], shape[1])
                    .is_err(),
                "{module}"
            );
        }
    }
}
