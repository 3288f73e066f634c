"""Files that only somebody with the keys can make: uploads and releases that are wrong and proven.

Such an upload has a proof that holds, such a release the server's half removed and a proof of
that; what is wrong is what they hold.
"""

import base64
import hashlib
import secrets
from collections.abc import Callable
from unittest.mock import patch

import numpy as np

from dtl.core.crypto import one_time, primitives, proof, release_proof, scheme
from dtl.core.crypto.residues import Bytes, from_integers, to_integers
from dtl.core.errors import FormatError
from dtl.core.files import canonical_json, sealed
from dtl.core.files.container import file_digest
from dtl.core.files.headers import ResultHeader
from dtl.core.files.key_file import Key
from dtl.core.files.ledger import Ledger, UploadEntry
from dtl.core.roles.participant.basis import Basis
from tests.vectors.scene import Edit, Scene, Tensors, tensor_digests

Numbers = list[int]
RECIPIENT = "carol"


def drawn(what: str, count: int) -> bytes:
    """Published bytes in place of random ones."""
    return hashlib.shake_256(f"forged/{what}".encode()).digest(count)


def proven(
    scene: Scene,
    name: str,
    header: Edit | None = None,
    body: Callable[[bytes], bytes] | None = None,
    blocks: Callable[[Numbers], Numbers] | None = None,
) -> bytes:
    """An upload with another header, body or blocks, as its participant can make it."""
    found, tensors = scene.bulk(name)
    key, public = scene.loaded_key(found["signer"]), scene.loaded_job().public_key
    if header:
        header(found)
    if body:
        shape, data = tensors["body"]
        tensors["body"] = shape, body(data)
    witnessed = scene.witnessed
    path = scene.folder / name
    encrypted = witnessed.opened(path)
    if blocks:
        changed = [number % public.n for number in blocks(to_integers(encrypted))]
        encrypted = from_integers(changed, encrypted.shape[-1]).reshape(encrypted.shape)
    with Ledger(key) as ledger:
        (entry,) = ledger.find(UploadEntry, upload=_digest(scene, name))
    keys = witnessed.one_time(path, key, Basis(entry.round, entry.base, entry.opened))
    groups = len(encrypted)
    exponents = one_time.group_randomness(keys.randomness, groups, public.exponent_bits)
    residues = scheme.encrypt(public, encrypted, exponents, groups)
    tensors["residues"] = tensors["residues"][0], residues.tobytes()
    digests = tensor_digests(tensors)
    witness, d = proof.commit(public, groups, drawn(name, proof.witness_bytes(public, groups)))
    raw = canonical_json.dumps(found)
    own = primitives.signing_public_key(key.secrets.sign)
    rho = proof.weights(public, raw, own, groups, digests["residues"], digests.get("body"), d)
    responder = proof.Responder(public, witness)
    responder.add(rho, exponents, encrypted)
    tensors["proof"] = tensors["proof"][0], proof.encode(public, groups, responder.proof(d))
    return scene.signed(raw, tensors, found["signer"])


def _digest(scene: Scene, name: str) -> str:
    header, tensors = scene.bulk(name)
    return file_digest(canonical_json.dumps(header), tensor_digests(tensors)).hex()


def result_of(
    scene: Scene, name: str, edit: Edit | None, change: Callable[[Tensors], object] | None
) -> tuple[dict[str, object], Tensors, bytes, bytes]:
    """A result (inside a release `name`) that the server signed with other contents.

    Returns header, tensors, digest and signature.
    """
    release, tensors = scene.bulk(name)
    tensors.pop("sealed")
    header = release["manifest"]
    if edit:
        edit(header)
    if change:
        change(tensors)
    digest = file_digest(canonical_json.dumps(header), tensor_digests(tensors))
    return header, tensors, digest, primitives.sign(scene.secret("server"), header["kind"], digest)


def released(
    scene: Scene,
    name: str,
    edit: Edit | None = None,
    change: Callable[[Tensors], object] | None = None,
    payload: Callable[[bytes], bytes] | None = None,
) -> bytes:
    """A release with another result inside, signed by the server as honest ones are.

    It is granted to one participant, so that it is small. `payload` changes what is sealed.
    """
    header, tensors, of, signature = result_of(scene, name, edit, change)
    job, server = scene.loaded_job(), scene.loaded_key("server")
    release, _ = scene.bulk(name)
    names = [RECIPIENT]
    shape, data = tensors["residues"]
    content_key = drawn(f"{of.hex()}/content", 32)
    encryption_key, commit = sealed.content_keys(content_key)
    manifest = ResultHeader.check(header, name)
    digests = tensor_digests(tensors)
    core = sealed.release_core(
        manifest, of.hex(), digests, names, job.residue_shape(manifest.values), commit
    )
    residues = np.frombuffer(data, np.uint8).reshape(shape)
    with patch.object(secrets, "token_bytes", lambda count: drawn(of.hex(), count)):
        plain = _payload(residues, core, of, server)
    if payload:
        plain = payload(plain)
    sealed_data = b"".join(sealed.seal_stream(encryption_key, core, [plain]))
    grants = []
    for person in names:
        participant = job.participant(person)
        assert participant is not None
        info = sealed.grant_info(core, person, participant.hpke, job.server.sign)
        wrapped = scene.dtl.wrap(participant.hpke, content_key, info)
        grants.append({"participant": person, "wrapped": base64.b64encode(wrapped).decode()})
    made = release | {
        "of": of.hex(),
        "manifest": header,
        "result_signature": signature.hex(),
        "grants": grants,
        "commit": base64.b64encode(commit).decode(),
    }
    return scene.signed(
        canonical_json.dumps(made),
        tensors | {"sealed": ([len(sealed_data)], sealed_data)},
        "server",
    )


def _payload(residues: Bytes, core: bytes, of: bytes, server: Key) -> bytes:
    """c' and the proof; zeros where the residues are not valid, and there can be none."""
    public = server.job.public_key
    groups = len(residues)
    length = release_proof.half_opened_bytes(public, groups) + release_proof.proof_length(public)
    try:
        scheme.check(public, residues)
    except FormatError:
        return bytes(length)
    opened = scheme.apply_half(public, residues, server.half)[:, 1:].tobytes()
    digest = hashlib.sha512(opened).digest()
    rho = release_proof.weights(core, of, digest, groups)
    base = release_proof.base_product(public, residues, rho)
    seed = server.server_secrets.server_seed
    return opened + release_proof.prove(public, server.half, seed, core, of, digest, base)


def reissued(scene: Scene, name: str, edit: Edit) -> bytes:
    """A release with another manifest, which the server signed; its keys do not open any more."""
    header, _, of, signature = result_of(scene, name, edit, None)
    release, all_tensors = scene.bulk(name)
    made = release | {"of": of.hex(), "manifest": header, "result_signature": signature.hex()}
    return scene.signed(canonical_json.dumps(made), all_tensors, "server")


def resealed(scene: Scene, name: str, edit: Callable[[bytes], bytes]) -> bytes:
    """A release with something else sealed under the same keys."""
    encryption_key, core, payload = unsealed(scene, name)
    data = b"".join(sealed.seal_stream(encryption_key, core, [edit(payload)]))
    return scene.tensors(name, lambda found: found.update(sealed=([len(data)], data)))


def unsealed(scene: Scene, name: str) -> tuple[bytes, bytes, bytes]:
    """(encryption key, core, payload) of a release that has one chunk."""
    release, tensors = scene.bulk(name)
    job, grant = scene.loaded_job(), release["grants"][0]
    manifest = ResultHeader.check(release["manifest"], name)
    digests = tensor_digests({key: item for key, item in tensors.items() if key != "sealed"})
    names = [item["participant"] for item in release["grants"]]
    commit = base64.b64decode(release["commit"])
    shape = job.residue_shape(manifest.values)
    core = sealed.release_core(manifest, release["of"], digests, names, shape, commit)
    secret = base64.b64decode(scene.key(grant["participant"])["hpke"])
    own = primitives.hpke_public_key(secret)
    info = sealed.grant_info(core, grant["participant"], own, job.server.sign)
    content_key = primitives.hpke_unwrap(secret, base64.b64decode(grant["wrapped"]), info)
    encryption_key, _ = sealed.content_keys(content_key)
    data = tensors["sealed"][1]
    return encryption_key, core, primitives.open_chunk(encryption_key, 0, True, data, core)
