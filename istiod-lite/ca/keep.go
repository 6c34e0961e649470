package ca

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Secrets of the CA, in the system namespace.
const (
	// PluggedInSecret is made by whoever brings a CA: ca-cert.pem, ca-key.pem, cert-chain.pem, root-cert.pem.
	PluggedInSecret = "cacerts"
	// SelfMadeSecret keeps the root made here: ca-cert.pem, ca-key.pem.
	SelfMadeSecret = "istio-ca-secret"
)

// FromCluster takes the plugged-in CA, or else the self-made one, which it makes and keeps the first time. It is read
// once: another CA is taken into use by a restart.
func FromCluster(ctx context.Context, client kubernetes.Interface, namespace, trustDomain string, log *zap.Logger) (*Authority, error) {
	secrets := client.CoreV1().Secrets(namespace)
	for _, name := range []string{PluggedInSecret, SelfMadeSecret} {
		secret, err := secrets.Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read CA secret %s/%s: %w", namespace, name, err)
		}
		return fromSecret(secret, log)
	}
	material, err := SelfMade(trustDomain)
	if err != nil {
		return nil, err
	}
	made := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: SelfMadeSecret},
		Type:       "istio.io/ca-root",
		Data:       map[string][]byte{CertFile: material.Cert, KeyFile: material.Key},
	}
	secret, err := secrets.Create(ctx, made, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) { // another replica was first
		secret, err = secrets.Get(ctx, SelfMadeSecret, metav1.GetOptions{})
	}
	if err != nil {
		return nil, fmt.Errorf("keep CA secret %s/%s: %w", namespace, SelfMadeSecret, err)
	}
	return fromSecret(secret, log)
}

func fromSecret(secret *corev1.Secret, log *zap.Logger) (*Authority, error) {
	a, err := NewAuthority(Material{Cert: secret.Data[CertFile], Key: secret.Data[KeyFile], Chain: secret.Data[ChainFile], Root: secret.Data[RootFile]})
	if err != nil {
		return nil, fmt.Errorf("CA secret %s/%s: %w", secret.Namespace, secret.Name, err)
	}
	log.Info("certificate authority", zap.String("secret", secret.Namespace+"/"+secret.Name), zap.Time("expires", a.cert.NotAfter))
	return a, nil
}

// FromDirectory takes the CA in a directory, which it makes the first time, and writes the roots to root-cert.pem, where
// the proxies of a mesh without Kubernetes find them.
func FromDirectory(dir, trustDomain string, log *zap.Logger) (*Authority, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("CA directory: %w", err)
	}
	material, err := readMaterial(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if material, err = SelfMade(trustDomain); err == nil {
			err = errors.Join(writeFile(filepath.Join(dir, KeyFile), material.Key, 0o600),
				writeFile(filepath.Join(dir, CertFile), material.Cert, 0o644))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("CA directory: %w", err)
	}
	a, err := NewAuthority(material)
	if err != nil {
		return nil, fmt.Errorf("CA directory %s: %w", dir, err)
	}
	if err := writeFile(filepath.Join(dir, RootFile), []byte(a.roots), 0o644); err != nil {
		return nil, fmt.Errorf("CA directory: %w", err)
	}
	log.Info("certificate authority", zap.String("dir", dir), zap.Time("expires", a.cert.NotAfter))
	return a, nil
}

func readMaterial(dir string) (Material, error) {
	var m Material
	var err error
	if m.Cert, err = os.ReadFile(filepath.Join(dir, CertFile)); err != nil {
		return m, err
	}
	if m.Key, err = os.ReadFile(filepath.Join(dir, KeyFile)); err != nil {
		return m, err
	}
	for name, part := range map[string]*[]byte{ChainFile: &m.Chain, RootFile: &m.Root} {
		if *part, err = os.ReadFile(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return m, err
		}
	}
	return m, nil
}

// writeFile replaces a file in one step, so that a reader sees the old or the new.
func writeFile(path string, content []byte, mode fs.FileMode) error {
	next := path + ".next"
	if err := os.WriteFile(next, content, mode); err != nil {
		return err
	}
	return os.Rename(next, path)
}
