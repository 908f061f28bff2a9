//! What `llama-quantize --imatrix` reads: how much each input column of a linear matters.
//!
//! llama.cpp weighs the error of column j by the mean square of its input. Here that is the
//! diagonal of the importance-weighted Hessian over the sum of the weights, Σ ω u_j² / Σ ω: images,
//! and the tokens that matter, count as they did for our own codes. Readers divide `in_sum2` by
//! `counts`, whole numbers of which they keep; `counts` is the number of tokens, and `in_sum2` the
//! mean times it.
//!
//! Rows of q and k may be paired in the model's file; columns never are, so an entry fits either
//! way. Experts of mixtures are left out.
//!
//! Source: ggml-org/llama.cpp `tools/imatrix/imatrix.cpp` and `common/imatrix-loader.cpp`.

use super::text::linear_name;
use crate::Result;
use crate::gguf::{TensorSpec, TensorType, Value, in_memory};
use crate::statistics::InputSquares;

/// The file for the linears of a decoder whose names begin with `prefix`, seen on `n_sequences`
/// samples of the data called `data`.
///
/// # Errors
/// [`crate::Error::Invalid`] for a module that comes twice.
pub fn imatrix_file<'a>(
    prefix: &str,
    squares: impl IntoIterator<Item = &'a InputSquares>,
    data: &str,
    n_sequences: usize,
) -> Result<Vec<u8>> {
    let mut tensors = Vec::new();
    let mut n_most = 0;
    for entry in squares {
        let n_tokens = entry.n_tokens as f32;
        n_most = n_most.max(entry.n_tokens);
        let sums: Vec<f32> = entry.mean().map(|mean| mean * n_tokens).collect();
        for name in entry
            .modules
            .iter()
            .filter_map(|module| linear_name(prefix, module))
        {
            let spec = |suffix: &str, n: usize| TensorSpec {
                name: format!("{name}.weight.{suffix}"),
                kind: TensorType::F32,
                shape: vec![1, n],
            };
            tensors.push((spec("counts", 1), vec![n_tokens]));
            tensors.push((spec("in_sum2", sums.len()), sums.clone()));
        }
    }
    tensors.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
    let per_sequence = n_most / (n_sequences as u64).max(1);
    let keys = [
        ("general.type", Value::from("imatrix")),
        ("imatrix.datasets", Value::Texts(vec![data.to_owned()])),
        ("imatrix.chunk_count", Value::U32(n_sequences as u32)),
        ("imatrix.chunk_size", Value::U32(per_sequence.max(1) as u32)),
    ];
    in_memory(&keys.map(|(key, value)| (key.to_owned(), value)), &tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgufFile;

    #[test]
    fn readers_find_the_means() {
        let squares = |modules: &[&str], mean: &[f32]| InputSquares {
            modules: modules.iter().map(|m| m.to_string()).collect(),
            n_tokens: 3,
            mean_bits: mean.iter().map(|v| v.to_bits()).collect(),
        };
        let all = [
            squares(
                &["m.layers.1.self_attn.q_proj", "m.layers.1.self_attn.k_proj"],
                &[0.5, 2.0],
            ),
            squares(
                &[
                    "m.layers.0.mlp.experts.3.down_proj",
                    "x.layers.0.mlp.up_proj",
                ],
                &[1.0],
            ),
        ];
        let bytes = imatrix_file("m", &all, "pictures", 2).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let read = GgufFile::open(file.path()).unwrap();
        let names: Vec<&str> = read.tensors().map(|spec| spec.name.as_str()).collect();
        let expected = ["attn_k", "attn_q"].map(|name| {
            ["counts", "in_sum2"].map(|suffix| format!("blk.1.{name}.weight.{suffix}"))
        });
        assert_eq!(names, expected.as_flattened());
        let sums: Vec<u8> = [1.5f32, 6.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(read.bytes("blk.1.attn_q.weight.in_sum2").unwrap(), sums);
        assert_eq!(read.keys()[3].1, Value::U32(1));
    }
}
