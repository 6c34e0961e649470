package identity

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// The files of OpenSelfSigned.
const (
	selfSignedRootFile = "root-cert.pem"
	selfSignedKeyFile  = "ca-key.pem"
)

// OpenSelfSigned is a SelfSigned whose root is kept in dir (root-cert.pem and ca-key.pem), so that several proxies with
// self-made certificates trust each other. The first to come makes it. A root made elsewhere serves as well.
func OpenSelfSigned(dir, trustDomain string, ttl time.Duration) (*SelfSigned, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open self-made root: %w", err)
	}
	lock, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open self-made root: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("open self-made root: lock %s: %w", dir, err)
	}
	rootPEM, err := os.ReadFile(filepath.Join(dir, selfSignedRootFile))
	if errors.Is(err, fs.ErrNotExist) {
		return makeSelfSigned(dir, trustDomain, ttl)
	}
	if err != nil {
		return nil, fmt.Errorf("open self-made root: %w", err)
	}
	keyPEM, err := os.ReadFile(filepath.Join(dir, selfSignedKeyFile))
	if err != nil {
		return nil, fmt.Errorf("open self-made root: %w", err)
	}
	s, err := parseSelfSigned(string(rootPEM), keyPEM, ttl)
	if err != nil {
		return nil, fmt.Errorf("open self-made root in %s: %w", dir, err)
	}
	return s, nil
}

// makeSelfSigned writes the key first: a root file says that both are there.
func makeSelfSigned(dir, trustDomain string, ttl time.Duration) (*SelfSigned, error) {
	s, err := NewSelfSigned(trustDomain, ttl)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(s.key)
	if err != nil {
		return nil, fmt.Errorf("encode root key: %w", err)
	}
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err := os.WriteFile(filepath.Join(dir, selfSignedKeyFile), keyPEM, 0o600); err != nil {
		return nil, fmt.Errorf("keep root key: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, selfSignedRootFile), []byte(s.rootPEM), 0o644); err != nil {
		return nil, fmt.Errorf("keep root: %w", err)
	}
	return s, nil
}

func parseSelfSigned(rootPEM string, keyPEM []byte, ttl time.Duration) (*SelfSigned, error) {
	roots, err := parseCertificates(rootPEM)
	if err != nil {
		return nil, err
	}
	if len(roots) != 1 {
		return nil, fmt.Errorf("%s: %d certificates, want 1", selfSignedRootFile, len(roots))
	}
	block, _ := pem.Decode(keyPEM)
	if block == nil {
		return nil, fmt.Errorf("%s: not PEM", selfSignedKeyFile)
	}
	key, err := parseKey(block)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", selfSignedKeyFile, err)
	}
	if public, ok := roots[0].PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(key.Public()) {
		return nil, fmt.Errorf("%s is not the key of %s", selfSignedKeyFile, selfSignedRootFile)
	}
	return newSelfSigned(key, roots[0], ttl), nil
}

func parseKey(block *pem.Block) (crypto.Signer, error) {
	switch block.Type {
	case "EC PRIVATE KEY":
		return x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		return x509.ParsePKCS1PrivateKey(block.Bytes)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse key: %w", err)
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a %T cannot sign", parsed)
	}
	return key, nil
}
