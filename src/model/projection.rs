//! Which linears a layer has, in the order in which they are solved.

use crate::model::decoder_config::DecoderConfig;

/// The role of a linear in its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention output.
    O,
    /// MLP gate.
    Gate,
    /// MLP up.
    Up,
    /// MLP down.
    Down,
}

impl Projection {
    /// All roles, in solve order.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Those of attention.
    pub const ATTENTION: [Self; 4] = [Self::Q, Self::K, Self::V, Self::O];

    /// Name inside a layer of a checkpoint whose MLP is one.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// One linear of a layer: its role, and in a mixture of experts whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// The role.
    pub projection: Projection,
    /// The expert's number, where the layer's MLP is a mixture and this is a part of it.
    pub expert: Option<usize>,
}

impl From<Projection> for Slot {
    fn from(projection: Projection) -> Self {
        Self {
            projection,
            expert: None,
        }
    }
}

impl Slot {
    /// Name inside a layer of a checkpoint, as loaders call it, also where the file keeps all
    /// experts in one tensor.
    pub fn name(self) -> String {
        let name = self.projection.name();
        match (self.expert, name.strip_prefix("mlp.")) {
            (Some(expert), Some(role)) => format!("mlp.experts.{expert}.{role}"),
            _ => name.to_owned(),
        }
    }

    /// Shape `[out, in]` of the weight.
    pub fn shape(self, config: &DecoderConfig) -> [usize; 2] {
        let hidden = config.hidden_size;
        let (q, kv) = (
            config.n_heads * config.head_dim,
            config.n_kv_heads * config.head_dim,
        );
        let inter = config.mlp_width(self.expert.is_some());
        match self.projection {
            Projection::Q => [q, hidden],
            Projection::K | Projection::V => [kv, hidden],
            Projection::O => [hidden, q],
            Projection::Gate | Projection::Up => [inter, hidden],
            Projection::Down => [hidden, inter],
        }
    }

    /// Whether it has a bias.
    pub fn has_bias(self, config: &DecoderConfig) -> bool {
        match self.projection {
            Projection::Q | Projection::K | Projection::V => config.qkv_bias,
            Projection::O => config.o_bias,
            Projection::Gate | Projection::Up | Projection::Down => false,
        }
    }
}

/// The linears of a layer in solve order: those of attention, then of all experts gate and up, then
/// of all experts down.
pub fn slots(config: &DecoderConfig, layer_idx: usize) -> Vec<Slot> {
    let experts: Vec<Option<usize>> = match config.n_experts(layer_idx) {
        Some(n) => (0..n).map(Some).collect(),
        None => vec![None],
    };
    let of_expert = |roles: &'static [Projection]| {
        let one = move |&expert: &Option<usize>| {
            let slot = move |&projection: &Projection| Slot { projection, expert };
            roles.iter().map(slot)
        };
        experts.iter().flat_map(one).collect::<Vec<_>>()
    };
    let mut all: Vec<Slot> = Projection::ATTENTION.map(Slot::from).to_vec();
    all.extend(of_expert(&[Projection::Gate, Projection::Up]));
    all.extend(of_expert(&[Projection::Down]));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::experts::Experts;

    #[test]
    fn a_mixture_has_its_linears_expert_by_expert_and_down_last() {
        let mut config = DecoderConfig::small(8, 12, [2, 1, 4]);
        config.n_layers = 2;
        config.experts = Some(Experts {
            n_experts: 2,
            n_chosen: 1,
            width: 6,
            is_mixture: vec![false, true],
        });
        let names = |layer_idx| -> Vec<String> {
            let all = slots(&config, layer_idx).into_iter();
            all.skip(4).map(Slot::name).collect()
        };
        assert_eq!(names(0), ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]);
        let expected = ["0.gate_proj", "0.up_proj", "1.gate_proj", "1.up_proj"];
        let expected = expected.into_iter().chain(["0.down_proj", "1.down_proj"]);
        let expected: Vec<String> = expected.map(|n| format!("mlp.experts.{n}")).collect();
        assert_eq!(names(1), expected);
        let last = *slots(&config, 1).last().unwrap();
        assert_eq!(last.shape(&config), [8, 6]);
        assert_eq!(slots(&config, 0).len(), 7);
    }
}
