package tlsrecord

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"hash"
	"math"

	"golang.org/x/crypto/chacha20poly1305"
)

// suite is what the record layer needs to know of a cipher suite.
type suite struct {
	id     uint16
	hash   func() hash.Hash
	keyLen int
	aead   func(key []byte) (cipher.AEAD, error)
	limit  uint64 // records after which the key is changed, RFC 8446 §5.5 (AES-GCM: 2^24.5)
}

func suiteByID(id uint16) (suite, error) {
	sha256New := func() hash.Hash { return sha256.New() }
	sha384New := func() hash.Hash { return sha512.New384() }
	switch id {
	case tls.TLS_AES_128_GCM_SHA256:
		return suite{id, sha256New, 16, gcm, 1 << 24}, nil
	case tls.TLS_AES_256_GCM_SHA384:
		return suite{id, sha384New, 32, gcm, 1 << 24}, nil
	case tls.TLS_CHACHA20_POLY1305_SHA256:
		return suite{id, sha256New, 32, chacha20poly1305.New, math.MaxUint64 - 1}, nil
	}
	return suite{}, fmt.Errorf("cipher suite %s is not one of TLS 1.3", tls.CipherSuiteName(id))
}

func gcm(key []byte) (cipher.AEAD, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

// half is one direction.
type half struct {
	suite  suite
	aead   cipher.AEAD
	iv     [12]byte
	nonce  [12]byte
	seq    uint64
	secret []byte
}

func (h *half) init(id uint16, secret []byte) (err error) {
	if h.suite, err = suiteByID(id); err != nil {
		return err
	}
	return h.set(secret)
}

// set derives key and iv, RFC 8446 §7.3.
func (h *half) set(secret []byte) error {
	h.secret = secret
	key, err := h.expand("key", h.suite.keyLen)
	if err != nil {
		return err
	}
	defer clear(key)
	iv, err := h.expand("iv", len(h.iv))
	if err != nil {
		return err
	}
	copy(h.iv[:], iv)
	h.seq = 0
	h.aead, err = h.suite.aead(key)
	return err
}

// update changes to the next generation of the key, RFC 8446 §7.2.
func (h *half) update() error {
	next, err := h.expand("traffic upd", len(h.secret))
	if err != nil {
		return err
	}
	clear(h.secret)
	return h.set(next)
}

// expand is HKDF-Expand-Label without a context, RFC 8446 §7.1.
func (h *half) expand(label string, n int) ([]byte, error) {
	info := binary.BigEndian.AppendUint16(nil, uint16(n))
	info = append(info, byte(len("tls13 ")+len(label)))
	info = append(append(info, "tls13 "...), label...)
	info = append(info, 0)
	return hkdf.Expand(h.suite.hash, h.secret, string(info), n)
}

func (h *half) next() []byte {
	h.nonce = h.iv
	binary.BigEndian.PutUint64(h.nonce[4:], binary.BigEndian.Uint64(h.iv[4:])^h.seq)
	h.seq++
	return h.nonce[:]
}

// seal writes header, content type and tag around the n bytes at buf[headerLen:] and encrypts them.
func (h *half) seal(buf []byte, n int, typ byte) {
	buf[headerLen+n] = typ
	binary.BigEndian.PutUint16(buf[3:], uint16(n+TailLen))
	buf[0], buf[1], buf[2] = typeData, 3, 3
	h.aead.Seal(buf[headerLen:headerLen], h.next(), buf[headerLen:headerLen+n+1], buf[:headerLen])
}

// open decrypts rec in place; false when it is not authentic.
func (h *half) open(rec []byte) ([]byte, bool) {
	p, err := h.aead.Open(rec[headerLen:headerLen], h.next(), rec[headerLen:], rec[:headerLen])
	return p, err == nil
}
