//! What is to be done to which module: a method, a number format, exceptions by name, and every
//! setting that may be turned. A recipe is whole and checked before any work begins.

mod allocation;
mod importance;
mod solver;
mod tuning;
mod value;

use crate::allocation::AllocationSettings;
use crate::importance::ImportanceSettings;
use crate::model::Module;
use crate::plan::{Bits, ScaleDtype, Scheme};
use crate::solver::{Clip, DampeningUnit, SolverSettings, Target};
use crate::statistics::StatisticsDtype;
use crate::tuning::TuningSettings;
use crate::{Error, Result};
use regex::Regex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;
use value::{number, word};

const DTYPES: [(&str, StatisticsDtype); 2] = [
    ("f32", StatisticsDtype::F32),
    ("bf16", StatisticsDtype::Bf16),
];

/// How codes are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Round to nearest, without calibration.
    Rtn,
    /// Round to nearest after input channels are scaled and weights limited (arXiv:2306.00978).
    Awq,
    /// The same search, by errors of vision and of answer tokens as much as each matters to the
    /// answers, without limits of weights (arXiv:2412.19509).
    Mbq,
    /// Every token alike (arXiv:2210.17323).
    Gptq,
    /// Every token alike, corrected for the drift of the inputs (arXiv:2504.02692).
    Gptaq,
    /// Every token alike, the drift corrected as least squares ask for (arXiv:2505.11695).
    Qronos,
    /// Tokens weighted by their importance (arXiv:2508.03351, first version).
    VlmqV1,
    /// Tokens weighted by the square of their importance (second version).
    VlmqV2,
    /// As the first version, on grids that are searched for, and the drift corrected in closed form as far
    /// as held-out samples bear it out. Ours; the default.
    Vlmq,
}

impl Method {
    /// All of them, from the simplest on.
    pub const ALL: [Self; 9] = [
        Self::Rtn,
        Self::Awq,
        Self::Mbq,
        Self::Gptq,
        Self::Gptaq,
        Self::Qronos,
        Self::VlmqV1,
        Self::VlmqV2,
        Self::Vlmq,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::Awq => "awq",
            Self::Mbq => "mbq",
            Self::Gptq => "gptq",
            Self::Gptaq => "gptaq",
            Self::Qronos => "qronos",
            Self::VlmqV1 => "vlmq-v1",
            Self::VlmqV2 => "vlmq-v2",
            Self::Vlmq => "vlmq",
        }
    }

    /// Whether scales of input channels are searched for.
    pub fn is_scaled(self) -> bool {
        matches!(self, Self::Awq | Self::Mbq)
    }

    fn importance(self) -> Option<ImportanceSettings> {
        match self {
            Self::Rtn | Self::Awq | Self::Mbq => None,
            Self::Gptq | Self::Gptaq | Self::Qronos => None,
            Self::VlmqV1 | Self::Vlmq => Some(ImportanceSettings::paper(1.0)),
            Self::VlmqV2 => Some(ImportanceSettings::paper(2.0)),
        }
    }

    fn solver(self) -> SolverSettings {
        let usual = SolverSettings::default();
        match self {
            Self::Vlmq => SolverSettings {
                target: Target::ResidualStream,
                held_out_alpha: true,
                clip: Clip::Weighted,
                ..usual
            },
            // 10⁻⁶ of the largest eigenvalue is what its authors' code adds.
            Self::Qronos => SolverSettings {
                target: Target::Qronos,
                dampening_frac: 1e-6,
                dampening_ladder: vec![1e-5, 1e-4, 1e-3, 1e-2],
                dampening_unit: DampeningUnit::LargestEigenvalue,
                ..usual
            },
            _ => usual,
        }
    }

    /// GPTAQ's published α, except where the paper falls back to GPTQ: at 2 bits. 1 is a whole
    /// correction, of which held-out samples tell the share.
    fn alpha(self, bits: u8) -> f32 {
        match self {
            Self::Rtn | Self::Awq | Self::Mbq | Self::Gptq => 0.0,
            Self::Gptaq => 0.25,
            Self::VlmqV1 | Self::VlmqV2 if bits <= 2 => 0.0,
            Self::VlmqV1 | Self::VlmqV2 => 0.25,
            Self::Qronos | Self::Vlmq => 1.0,
        }
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|method| method.name() == name);
        known.ok_or_else(|| Error::Unsupported {
            what: format!(
                "method {name:?}; rtn, awq, mbq, gptq, gptaq, qronos, vlmq-v1, vlmq-v2 \
                 and vlmq are implemented"
            ),
        })
    }
}

/// Modules whose name a pattern matches, and what becomes of them.
#[derive(Clone, Debug)]
struct Rule {
    pattern: Regex,
    /// `None` leaves the module as it is.
    scheme: Option<Scheme>,
    /// Whether the rule itself says how many bits.
    has_bits: bool,
}

/// Method, formats and settings of one run.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// How codes are found.
    pub method: Method,
    /// What the solver may be told; its α is decided per module by [`Recipe::alpha`].
    pub solver: SolverSettings,
    /// How tokens are weighted; `None` weighs them alike.
    pub importance: Option<ImportanceSettings>,
    /// What inputs are rounded to for the statistics.
    pub statistics_dtype: StatisticsDtype,
    /// How scales are tuned after the last layer, as set; see [`Recipe::tuning`].
    tuning: TuningSettings,
    /// How bits are shared out to modules, where they are a mean.
    pub allocation: AllocationSettings,
    scheme: Scheme,
    bits: Bits,
    alpha: Option<f32>,
    rules: Vec<Rule>,
    /// Formats of the modules that bits were shared out to, by name.
    shared: BTreeMap<String, Scheme>,
}

impl Recipe {
    /// The method's own settings and one number format for all modules.
    pub fn new(method: Method, scheme: Scheme) -> Self {
        Self {
            method,
            scheme,
            solver: method.solver(),
            importance: method.importance(),
            statistics_dtype: StatisticsDtype::default(),
            tuning: TuningSettings::default(),
            allocation: AllocationSettings::default(),
            bits: Bits::Each(scheme.bits()),
            alpha: None,
            rules: Vec::new(),
            shared: BTreeMap::new(),
        }
    }

    /// The same, with a mean of bits that is shared out to the modules ([`crate::allocation`]);
    /// anything else is the scheme's to say. A mean's scheme has [`Bits::ceil`] bits.
    #[must_use]
    pub fn with_bits(mut self, bits: Bits) -> Self {
        if let Bits::Mean(_) = bits {
            self.bits = bits;
        }
        self
    }

    /// Bits of every code, or their mean.
    pub fn bits(&self) -> Bits {
        self.bits
    }

    /// Whether a module is one of those that a mean of bits is shared out to: no rule says how many
    /// it has, and none leaves it as it is.
    pub fn shares_bits(&self, module: &str) -> bool {
        let has_own = |rule: &Rule| rule.has_bits || rule.scheme.is_none();
        matches!(self.bits, Bits::Mean(_)) && !self.rule_of(module).is_some_and(has_own)
    }

    /// The same, with widths that were found for modules.
    ///
    /// # Errors
    /// As [`Scheme::with_bits`].
    pub fn with_widths<'a>(&self, widths: impl Iterator<Item = (&'a str, u8)>) -> Result<Self> {
        let mut recipe = self.clone();
        for (module, bits) in widths {
            if let Some(scheme) = self.scheme_of(module) {
                let scheme = scheme.with_bits(bits)?;
                recipe.shared.insert(module.to_owned(), scheme);
            }
        }
        Ok(recipe)
    }

    /// The number format of modules without a rule of their own.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The number format of a module by its checkpoint name; `None` leaves it as it is. The first
    /// rule that matches decides.
    pub fn scheme_of(&self, module: &str) -> Option<Scheme> {
        let of_rule = || match self.rule_of(module) {
            Some(rule) => rule.scheme,
            None => Some(self.scheme),
        };
        self.shared.get(module).copied().or_else(of_rule)
    }

    fn rule_of(&self, module: &str) -> Option<&Rule> {
        self.rules.iter().find(|rule| rule.pattern.is_match(module))
    }

    /// α for a module of this number format.
    pub fn alpha(&self, scheme: Scheme) -> f32 {
        self.alpha.unwrap_or(self.method.alpha(scheme.bits()))
    }

    /// How scales are tuned after the last layer, where they are.
    pub fn tuning(&self) -> Option<TuningSettings> {
        let is_on = self.tuning.steps > 0 && self.needs_calibration();
        is_on.then_some(self.tuning)
    }

    /// Whether samples are needed.
    pub fn needs_calibration(&self) -> bool {
        self.method != Method::Rtn
    }

    /// Whether the full-precision stream must be followed for any of `schemes`.
    pub fn needs_full_stream(&self, schemes: &[Scheme]) -> bool {
        let importance = self.importance.as_ref();
        importance.is_some_and(ImportanceSettings::needs_full_stream)
            || schemes.iter().any(|s| self.alpha(*s) != 0.0)
    }

    /// Turns one setting, as `--set key=value` does.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the allowed keys, or what is wrong with the value.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        let invalid = |why: String| Error::Invalid {
            what: format!("--set {assignment}"),
            why,
        };
        let (key, value) = assignment
            .split_once('=')
            .ok_or_else(|| invalid("key=value expected".into()))?;
        let outcome = match key {
            "alpha" => Some(self.set_alpha(value)),
            "statistics_dtype" => Some(word(value, &DTYPES).map(|w| self.statistics_dtype = w)),
            _ if key.starts_with("importance_") => {
                let why = format!("{} gives every token the same weight", self.method.name());
                let settings = self.importance.as_mut().ok_or_else(|| invalid(why))?;
                importance::set(settings, key, value)
            }
            _ if key.starts_with("tune_") && !self.needs_calibration() => {
                Some(Err(format!("{} needs no samples", self.method.name())))
            }
            _ if key.starts_with("tune_") => tuning::set(&mut self.tuning, key, value),
            _ if key.starts_with("allocation_") => {
                allocation::set(&mut self.allocation, key, value)
            }
            _ => solver::set(&mut self.solver, key, value),
        };
        let unknown = || {
            let keys = [
                solver::KEYS,
                importance::KEYS,
                tuning::KEYS,
                allocation::KEYS,
            ]
            .join(", ");
            Err(format!(
                "unknown key; there are alpha, statistics_dtype, {keys}"
            ))
        };
        outcome.unwrap_or_else(unknown).map_err(invalid)
    }

    /// A number, or `held_out`: found by row on a part of the samples, where a whole correction is 1.
    fn set_alpha(&mut self, value: &str) -> std::result::Result<(), String> {
        self.solver.held_out_alpha = value == "held_out";
        let alpha = match self.solver.held_out_alpha {
            true => Ok(1.0),
            false => {
                number(value, 0.0, 1.0).map_err(|why| format!("{why}, or held_out for one by row"))
            }
        };
        alpha.map(|alpha| self.alpha = Some(alpha as f32))
    }

    /// Whether settings go together, which no single one can tell.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming those that do not.
    pub fn check(&self) -> Result<()> {
        let schemes = self.rules.iter().filter_map(|rule| rule.scheme);
        for scheme in schemes.chain([self.scheme]) {
            let alpha = self.alpha(scheme);
            let solver = SolverSettings {
                alpha,
                ..self.solver.clone()
            };
            solver.check()?;
            if self.needs_calibration() && !self.method.is_scaled() {
                solver.check_scheme(scheme)?;
            }
            if scheme.scale_dtype() == ScaleDtype::Superblock && self.tuning().is_some() {
                return Err(Error::Invalid {
                    what: "tune_steps".into(),
                    why: "tuning moves scales one by one, which scale_dtype superblock ties".into(),
                });
            }
        }
        if matches!(self.bits, Bits::Mean(_)) && !self.needs_calibration() {
            return Err(Error::Invalid {
                what: format!("--bits {}", self.bits),
                why: format!(
                    "{} looks at no samples, which bits are shared out by; another method, or a \
                     whole number, expected",
                    self.method.name()
                ),
            });
        }
        if self.method.is_scaled() && self.tuning().is_some() {
            let name = self.method.name();
            return Err(Error::Invalid {
                what: "tune_steps".into(),
                why: format!("{name} changes other tensors too; tuning takes these as they were"),
            });
        }
        self.importance
            .as_ref()
            .map_or(Ok(()), ImportanceSettings::check)
    }

    /// Whether a mean of bits has been shared out, where there is one.
    ///
    /// # Errors
    /// [`Error::Missing`] naming a module that has no bits yet.
    pub fn check_shared(&self, modules: &[Module]) -> Result<()> {
        let has_none =
            |m: &&Module| self.shares_bits(&m.name) && !self.shared.contains_key(&m.name);
        match modules.iter().find(has_none) {
            None => Ok(()),
            Some(module) => Err(Error::Missing {
                what: format!("bits of {}", module.name),
                place: "the recipe, whose mean is yet to be shared out".into(),
            }),
        }
    }

    /// Adds the rules of a recipe file:
    /// ```toml
    /// [[rule]]
    /// pattern = '\.mlp\.down_proj$'   # a regular expression, searched in the module's name
    /// bits = 4                        # what is absent is as in the rest of the model
    /// [[rule]]
    /// pattern = 'layers\.0\.'
    /// skip = true
    /// ```
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Format`] naming the rule.
    pub fn read_rules(&mut self, path: &Path) -> Result<()> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, "read", e))?;
        let file: RuleFile = toml::from_str(&text)
            .map_err(|e| Error::format(path, "recipe", e.message().to_owned()))?;
        for (i, row) in file.rule.iter().enumerate() {
            let rule = row.rule(self.scheme);
            self.rules
                .push(rule.map_err(|why| Error::format(path, format!("rule {i}"), why))?);
        }
        Ok(())
    }

    /// Patterns of the rules that match none of `modules`.
    pub fn idle_rules<'a>(&'a self, modules: &'a [String]) -> impl Iterator<Item = &'a str> {
        let idle = |rule: &&Rule| !modules.iter().any(|m| rule.pattern.is_match(m));
        self.rules
            .iter()
            .filter(idle)
            .map(|rule| rule.pattern.as_str())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleFile {
    #[serde(default)]
    rule: Vec<RuleRow>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleRow {
    pattern: String,
    #[serde(default)]
    skip: bool,
    bits: Option<u8>,
    group_size: Option<i64>,
    symmetric: Option<bool>,
    scale_dtype: Option<ScaleDtype>,
}

impl RuleRow {
    fn rule(&self, rest: Scheme) -> std::result::Result<Rule, String> {
        let pattern = Regex::new(&self.pattern).map_err(|e| format!("pattern: {e}"))?;
        let group_size = match self.group_size {
            None => rest.group_size(),
            Some(-1) => None,
            Some(n) => Some(usize::try_from(n).map_err(|_| format!("group_size {n}"))?),
        };
        let scheme = Scheme::new(
            self.bits.unwrap_or(rest.bits()),
            group_size,
            self.symmetric.unwrap_or(rest.symmetric()),
            self.scale_dtype.unwrap_or(rest.scale_dtype()),
        );
        let scheme = scheme.map_err(|e| e.to_string())?;
        Ok(Rule {
            pattern,
            scheme: (!self.skip).then_some(scheme),
            has_bits: self.bits.is_some(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(method: Method, bits: u8) -> Recipe {
        let scheme = Scheme::new(bits, Some(64), false, ScaleDtype::Bf16).unwrap();
        Recipe::new(method, scheme)
    }

    #[test]
    fn presets_are_the_papers() {
        let v1 = recipe(Method::VlmqV1, 3);
        assert_eq!(v1.importance.unwrap().power, 1.0);
        assert_eq!(v1.alpha(v1.scheme()), 0.25);
        let v2 = recipe(Method::VlmqV2, 2);
        assert_eq!(v2.importance.unwrap().power, 2.0);
        assert_eq!(v2.alpha(v2.scheme()), 0.0);
        assert_eq!(v2.solver, SolverSettings::default());
        assert!(recipe(Method::Gptq, 4).importance.is_none());
        assert!(!recipe(Method::Rtn, 4).needs_calibration());
    }

    #[test]
    fn the_default_finds_alpha_by_itself_unless_told() {
        let mut vlmq = recipe(Method::Vlmq, 2);
        vlmq.check().unwrap();
        assert!(vlmq.solver.held_out_alpha && vlmq.needs_full_stream(&[vlmq.scheme()]));
        vlmq.set("target=pull").unwrap();
        assert!(matches!(vlmq.check(), Err(Error::Invalid { .. })));
        vlmq.set("alpha=0.25").unwrap();
        vlmq.check().unwrap();
        assert_eq!(vlmq.alpha(vlmq.scheme()), 0.25);
    }

    #[test]
    fn names_are_read_back() {
        for method in Method::ALL {
            assert_eq!(method.name().parse::<Method>().unwrap(), method);
        }
        assert!("awq2".parse::<Method>().is_err());
    }

    #[test]
    fn settings_are_checked() {
        let mut r = recipe(Method::VlmqV1, 3);
        for good in [
            "dampening_frac=0.05",
            "alpha=held_out",
            "alpha=1",
            "act_order=false",
            "clip=mse",
            "clip=weighted",
            "target=least_squares",
            "target=residual_stream",
            "sweeps=2",
            "refit_scales=false",
            "unit_gain=true",
            "col_block=64",
            "statistics_dtype=bf16",
            "importance_power=1.5",
            "importance_norm=rms",
            "importance_loss=layer",
            "importance_loss=answer",
            "tune_steps=100",
            "tune_batch=4",
            "tune_rate=0.01",
            "tune_loss=all",
            "tune_samples=512",
        ] {
            r.set(good).unwrap();
        }
        assert_eq!(r.alpha(r.scheme()), 1.0);
        assert_eq!(r.solver.dampening_frac, 0.05);
        for bad in [
            "alpha",
            "alpha=2",
            "alpha=nan",
            "alpha=auto",
            "clip=l2",
            "target=obq",
            "clip_power=2",
            "sweeps=-1",
            "statistics_dtype=int8",
            "percdamp=0.1",
            "act_order=1",
            "tune_steps=-1",
            "tune_rate=0",
            "tune_loss=none",
            "tune_samples=1",
        ] {
            assert!(matches!(r.set(bad), Err(Error::Invalid { .. })), "{bad}");
        }
        assert!(recipe(Method::Gptq, 3).set("importance_power=2").is_err());
        assert_eq!(r.tuning().map(|t| (t.steps, t.batch)), Some((100, 4)));
        assert!(recipe(Method::Gptq, 3).tuning().is_none());
        assert!(recipe(Method::Rtn, 3).set("tune_steps=1").is_err());
        let mut awq = recipe(Method::Awq, 3);
        awq.set("tune_steps=1").unwrap();
        assert!(matches!(awq.check(), Err(Error::Invalid { .. })));
    }

    #[test]
    fn the_first_matching_rule_decides() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("recipe.toml");
        let text = "[[rule]]\npattern = 'layers\\.0\\.'\nskip = true\n\
                    [[rule]]\npattern = 'down_proj$'\nbits = 4\ngroup_size = -1\n\
                    [[rule]]\npattern = 'nowhere'\nskip = true\n";
        std::fs::write(&path, text).unwrap();
        let mut r = recipe(Method::Gptq, 2);
        r.read_rules(&path).unwrap();
        assert_eq!(r.scheme_of("model.layers.0.mlp.down_proj"), None);
        let down = r.scheme_of("model.layers.1.mlp.down_proj").unwrap();
        assert_eq!((down.bits(), down.group_size()), (4, None));
        assert_eq!(r.scheme_of("model.layers.1.mlp.up_proj"), Some(r.scheme()));
        let modules = [
            "model.layers.0.a".to_owned(),
            "model.layers.1.mlp.down_proj".to_owned(),
        ];
        assert_eq!(r.idle_rules(&modules).collect::<Vec<_>>(), ["nowhere"]);
        for bad in [
            "[[rule]]\nbits = 3",
            "[[rule]]\npattern = '('",
            "[[rule]]\npattern = 'a'\nbits = 5",
        ] {
            std::fs::write(&path, bad).unwrap();
            assert!(
                matches!(r.read_rules(&path), Err(Error::Format { .. })),
                "{bad}"
            );
        }
    }
}
