"""What holds unless somebody says otherwise: every default of the tool, in one place."""

MODULUS_BITS = 3072
SLOT_BITS = 24
FRACTION_BITS = 20
MIN_CONTRIBUTORS = 3
LR = 1.0

TEST_SHARE = 0.2
HIDDEN = "32"
LOCAL_LR = 0.1
BATCH_SIZE = 32
SEED = 0

SIMULATION_PARTICIPANTS = "5"
SIMULATION_ROUNDS = 30
SIMULATION_HIDDEN = (64,)
SIMULATION_EPOCHS = 1
SIMULATION_LR = {"sgd": LOCAL_LR, "momentum": LOCAL_LR, "adam": 0.01}
