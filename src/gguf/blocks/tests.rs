use super::*;
use crate::Matrix;
use crate::gguf::codes;
use crate::plan::ScaleDtype;
use crate::plan::super_block::common_unit;
use proptest::prelude::*;

/// A weight of two rows whose codes, scales and zero points follow from `seed`.
fn weight(
    bits: u8,
    group: Option<usize>,
    symmetric: bool,
    cols: usize,
    seed: u64,
) -> QuantizedWeight {
    let scheme = Scheme::new(bits, group, symmetric, ScaleDtype::Bf16).unwrap();
    let mut state = seed | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as u32
    };
    let n_groups = cols / group.unwrap_or(cols);
    let codes = (0..2 * cols)
        .map(|_| (next() & u32::from(scheme.max_code())) as u8)
        .collect();
    let scale = |n: u32| half::bf16::from_f32(0.001 + (n % 4096) as f32 / 65536.0).to_f32();
    let scales: Vec<f32> = (0..2 * n_groups).map(|_| scale(next())).collect();
    let middle = 1 << (bits - 1);
    let zeros = (0..2 * n_groups).map(|_| match symmetric {
        true => middle,
        false => (next() & u32::from(scheme.max_code())) as u8,
    });
    let zeros = zeros.collect();
    let scales = Matrix::from_vec("scales", 2, n_groups, scales).unwrap();
    QuantizedWeight::new("m", scheme, [2, cols], codes, scales, zeros).unwrap()
}

fn encoded(weight: &QuantizedWeight) -> (TensorType, Vec<u8>, Rounding) {
    let kind = kind_of("m", weight.scheme(), weight.cols()).unwrap();
    let mut rounding = Rounding::default();
    let blocks = encode("m", weight, kind, |row| row, &mut rounding).unwrap();
    (kind, blocks, rounding)
}

/// [`codes`] is the way back.
fn assert_codes_come_back(weight: &QuantizedWeight, blocks: &[u8], kind: TensorType) {
    let shape = [weight.rows(), weight.cols()];
    let found = codes("m", blocks, kind, weight.scheme(), shape).unwrap();
    assert_eq!(found.codes(), weight.codes());
    assert_eq!(found.zero_points(), weight.zero_points());
    assert_eq!(found.scales(), weight.scales());
    let scheme = weight
        .scheme()
        .with_scale_dtype(found.scheme().scale_dtype());
    assert_eq!(found.scheme(), scheme);
}

proptest! {
    #[test]
    fn symmetric_weights_are_exact(
        bits in prop::sample::select(vec![2u8, 3, 4, 8]),
        group in prop::sample::select(vec![Some(32usize), Some(64), None]),
        seed: u64,
    ) {
        let weight = weight(bits, group, true, 192, seed);
        let (kind, blocks, rounding) = encoded(&weight);
        prop_assert_eq!(blocks.len(), 2 * 6 * kind.block_bytes());
        prop_assert_eq!(decode(&blocks, kind).unwrap(), weight.dequantize().into_vec());
        prop_assert_eq!(rounding.n_scales_rounded, 0);
        assert_codes_come_back(&weight, &blocks, kind);
    }

    /// An offset has 12 bits (8 of the scale, 4 of the zero point), f16 has 11: half an ulp of it.
    #[test]
    fn asymmetric_weights_differ_by_the_rounding_of_the_offset_only(
        bits in prop::sample::select(vec![2u8, 3, 4]),
        group in prop::sample::select(vec![Some(32usize), Some(96), None]),
        seed: u64,
    ) {
        let weight = weight(bits, group, false, 192, seed);
        let (kind, blocks, rounding) = encoded(&weight);
        prop_assert_eq!(kind, TensorType::Q4_1);
        assert_codes_come_back(&weight, &blocks, kind);
        let largest = f64::from(weight.scheme().max_code());
        prop_assert!(rounding.largest_offset_change <= largest * 2f64.powi(-11));
        let expected = weight.dequantize();
        let group = 192 / weight.n_groups();
        for (i, (found, expected)) in
            decode(&blocks, kind).unwrap().iter().zip(expected.data()).enumerate()
        {
            let step = weight.scales().data()[i / group];
            let error = f64::from(found - expected).abs() / f64::from(step);
            prop_assert!(error <= rounding.largest_offset_change * 1.000_001, "{i}: {error}");
        }
    }

    #[test]
    fn super_blocks_are_exact(is_three: bool, unit in 1u16..20_000, seed: u64) {
        let (bits, max) = if is_three { (3, 31) } else { (2, 15) };
        let unit = f16::from_bits(unit + 0x400).to_f32();
        let plain = weight(bits, Some(16), true, 512, seed);
        let multiple = |i: usize| ((seed >> (i % 48)) % max + 1) as f32;
        let scales: Vec<f32> = (0..64).map(|i| unit * multiple(i)).collect();
        let scheme = Scheme::new(bits, Some(16), true, ScaleDtype::F32).unwrap();
        let scales = Matrix::from_vec("scales", 2, 32, scales).unwrap();
        let zeros = plain.zero_points().to_vec();
        let codes = plain.codes().to_vec();
        let weight = QuantizedWeight::new("m", scheme, [2, 512], codes, scales, zeros).unwrap();
        let (kind, blocks, _) = encoded(&weight);
        prop_assert_eq!(kind, if is_three { TensorType::Q3K } else { TensorType::Q2K });
        assert_codes_come_back(&weight, &blocks, kind);
        prop_assert_eq!(decode(&blocks, kind).unwrap(), weight.dequantize().into_vec());
    }
}

#[test]
fn rows_come_in_the_order_asked_for() {
    let weight = weight(4, Some(32), true, 64, 5);
    let (kind, straight, _) = encoded(&weight);
    let turned = encode("m", &weight, kind, |row| 1 - row, &mut Rounding::default()).unwrap();
    assert_eq!(turned[..36], straight[36..]);
    assert_eq!(turned[36..], straight[..36]);
}

#[test]
fn what_has_no_type_is_refused_with_a_reason() {
    let scheme =
        |bits, group, symmetric| Scheme::new(bits, group, symmetric, ScaleDtype::Bf16).unwrap();
    for (scheme, cols, part) in [
        (scheme(8, Some(32), false), 64, "asymmetric 8 bits"),
        (scheme(4, Some(8), true), 64, "multiple of 32"),
        (scheme(4, None, true), 48, "48 columns"),
        (scheme(3, Some(16), false), 256, "multiple of 32"),
        (scheme(3, Some(16), true), 128, "256 columns"),
    ] {
        let error = kind_of("layer.q", scheme, cols).unwrap_err().to_string();
        assert!(error.contains("layer.q") && error.contains(part), "{error}");
    }
}

#[test]
fn scales_that_f16_lacks_are_counted_or_refused() {
    let mut rounding = Rounding::default();
    rounding.scale("m", 0.5).unwrap();
    rounding.scale("m", 1.0 + f32::EPSILON).unwrap();
    assert_eq!((rounding.n_scales, rounding.n_scales_rounded), (2, 1));
    assert!(rounding.largest_scale_change > 0.0);
    for scale in [1e-9, 1e6] {
        let error = rounding.scale("layer.q", scale).unwrap_err().to_string();
        assert!(error.contains("layer.q"), "{error}");
    }
    assert!(rounding.offset("m", f16::from_f32(60_000.0), 3).is_err());
    assert_eq!(rounding.offset("m", f16::ONE, 0).unwrap().to_bits(), 0);
}

#[test]
fn scales_on_no_grid_are_refused() {
    let mut scales = [1.0f32; 16];
    scales[3] = 1.0 / 3.0;
    assert_eq!(common_unit(&scales, 31), None);
    let error = super_block::encode_row("layer.q", &[0; 256], &scales, true, &mut Vec::new());
    assert!(error.unwrap_err().to_string().contains("layer.q"));
    scales[3] = 0.5;
    let found = common_unit(&scales, 15).unwrap();
    assert_eq!(
        (found.unit.to_f32(), found.multiples[3], found.multiples[4]),
        (0.5, 1, 2)
    );
}

/// Blocks of every type mean to us what they mean to the `gguf` package, which made the file
/// (`tests/oracle/gguf_golden.py`).
#[test]
fn blocks_mean_what_another_reader_finds_in_them() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/gguf/blocks.json");
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let types = golden["types"].as_object().unwrap();
    assert_eq!(types.len(), 5);
    for (name, golden) in types {
        let kinds = (0..64).filter_map(TensorType::from_id);
        let kind = kinds.into_iter().find(|kind| kind.name() == name).unwrap();
        let hex = golden["blocks"].as_str().unwrap();
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        let blocks: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
        let bits = golden["bits"].as_array().unwrap().iter();
        let expected: Vec<f32> = bits
            .map(|bits| f32::from_bits(bits.as_u64().unwrap() as u32))
            .collect();
        assert_eq!(decode(&blocks, kind).unwrap(), expected, "{name}");
    }
}
