"""The commands of the vectors: each does its work with the good files of its job."""

from tests.vectors.scenarios import FOUR, PRESENT, THREE

LATTICE, DIRECT = "three-rounds", "sums"

UPLOADS = " ".join(f"{name}-3.upload" for name in FOUR)
SUM = f"aggregate {UPLOADS} --key job/server.key -o out"
LATER = " ".join(f"{name}-2.upload" for name in PRESENT)
REVEALS = " ".join(f"{name}-2.reveal" for name in PRESENT)
MODEL = f"aggregate {LATER} --key job/server.key --model model-1.enc --close round-2.close"
MODEL_OUT = f"{MODEL} --reveals {REVEALS} -o out"
VERIFY = (
    f"verify model-2.enc --job job/job.json --model model-1.enc --uploads {LATER} "
    f"--reveals {REVEALS}"
)
VERIFY_SUM = f"verify sum-3.enc --job job/job.json --uploads {UPLOADS}"
VERIFY_RELEASE = "verify model-1.release --key job/carol.key"
INITIAL = MODEL_OUT.replace("--model model-1.enc", "--initial w0.safetensors")
FIRST = INITIAL.replace("-2.", "-1.")
REVEAL = "reveal-masks round-2.close --key job/alice.key -o out"
OPEN = "open-model model-1.release --key job/alice.key -o out.safetensors"
EVIDENCE = (
    "--uploads alice-1.upload bob-1.upload carol-1.upload --initial w0.safetensors "
    "--reveals alice-1.reveal bob-1.reveal carol-1.reveal"
)
OPEN_RECOMPUTED = f"{OPEN} {EVIDENCE}"
VERIFY_ALL = f"{VERIFY_RELEASE} {EVIDENCE}"
OPEN_SUM = "open-model sum-3.release --key job/carol.key -o out.safetensors"
JOB = "verify job/job.json"
ENCRYPT = (
    "encrypt-grads alice.grads --key job/alice.key --model alice.model-2.safetensors --round 9 "
    "-o out"
)
AGAIN = ENCRYPT.replace("model-2", "model-1")
CLOSE = "close-round alice-1.upload bob-1.upload carol-1.upload --key job/server.key -o out"
RELEASE = "release-model model-2.enc --key job/server.key -o out"
AUDIT = "audit alice-3.upload --key job/kgc.key"
AUDIT_LATER = "audit alice-2.upload --key job/kgc.key --model model-1.enc"
A, B, LATE = "alice-3.upload", "bob-3.upload", "alice-2.upload"


OTHER = "5a" * 64
TAG = "5a" * 16
ENCRYPT_NAMED = "encrypt-grads alice.grads --key job/alice.key --round 9 -o out"
DIRECT_UPLOADS = " ".join(f"{name}-1.upload" for name in THREE)
DIRECT_SUM = f"aggregate {DIRECT_UPLOADS} --key job/server.key -o out"
DIRECT_MODEL = f"{DIRECT_SUM} --initial w0.safetensors"
DIRECT_VERIFY = (
    f"verify model-1.enc --job job/job.json --uploads {DIRECT_UPLOADS} --initial w0.safetensors"
)
DIRECT_OPEN = "open-model sum-1.release --key job/carol.key -o out.safetensors"
DIRECT_RECOMPUTED = f"{DIRECT_OPEN} --uploads {DIRECT_UPLOADS}"
DIRECT_AUDIT = "audit alice-2.upload --key job/kgc.key --model sum-1.enc"
ENCRYPT_FIRST = (
    "encrypt-grads carol.grads --key job/carol.key --model w0.safetensors --round 9 "
    "--accept-differencing -o out"
)
APPLY = (
    "apply-sum bob.sum-1.safetensors --model w0.safetensors --key job/bob.key -o out.safetensors"
)
OWN_STEP = (
    "encrypt-grads bob.grads --key job/bob.key --model alice.w1.safetensors --own-step -o out"
)
STEPPED = (
    "encrypt-grads alice.grads --key job/alice.key --model alice.w1.safetensors --round 9 "
    "--accept-differencing -o out"
)
