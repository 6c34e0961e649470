package pki

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func makeFiles(t *testing.T) map[string][]byte {
	t.Helper()
	files, err := Make(Request{Cluster: "lab", Server: netip.MustParseAddr("172.30.0.1"),
		Addresses: []netip.Addr{netip.MustParseAddr("172.30.0.1"), netip.MustParseAddr("fd66::1")}, Nodes: []string{"node1"}, Now: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestCertificates(t *testing.T) {
	files := makeFiles(t)
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(files["ca.crt"]) {
		t.Fatal("no CA")
	}
	for _, c := range []struct {
		name, user, group, host string
		usage                   x509.ExtKeyUsage
	}{
		{"apiserver", "kube-apiserver", "", "kubernetes.default.svc", x509.ExtKeyUsageServerAuth},
		{"apiserver", "kube-apiserver", "", "fd66::1", x509.ExtKeyUsageServerAuth},
		{"admin", "kubernetes-admin", "system:masters", "", x509.ExtKeyUsageClientAuth},
		{"node1", "system:node:node1", "system:nodes", "", x509.ExtKeyUsageClientAuth},
		{"kube-proxy", "system:kube-proxy", "", "", x509.ExtKeyUsageClientAuth},
	} {
		pair, err := tls.X509KeyPair(files[c.name+".crt"], files[c.name+".key"])
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: c.host, KeyUsages: []x509.ExtKeyUsage{c.usage}}); err != nil {
			t.Errorf("%s as %q: %v", c.name, c.host, err)
		}
		if got := pair.Leaf.Subject; got.CommonName != c.user || strings.Join(got.Organization, ",") != c.group {
			t.Errorf("%s: subject %v", c.name, got)
		}
	}
}

func TestKubeconfigHoldsItsClient(t *testing.T) {
	files := makeFiles(t)
	kc := string(files["node1.kubeconfig"])
	for _, w := range []string{"https://172.30.0.1:6443", "current-context: lab", base64.StdEncoding.EncodeToString(files["node1.crt"]), base64.StdEncoding.EncodeToString(files["ca.crt"])} {
		if !strings.Contains(kc, w) {
			t.Errorf("kubeconfig lacks %q", w)
		}
	}
}

func TestServiceAccountKeysMatch(t *testing.T) {
	files := makeFiles(t)
	priv, _ := pem.Decode(files["sa.key"])
	k, err := x509.ParsePKCS8PrivateKey(priv.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	pub, _ := pem.Decode(files["sa.pub"])
	want, err := x509.MarshalPKIXPublicKey(k.(crypto.Signer).Public())
	if err != nil || !bytes.Equal(want, pub.Bytes) {
		t.Errorf("sa.pub is not the public half of sa.key (%v)", err)
	}
}

func TestWriteModes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	if err := Write(dir, makeFiles(t)); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{"ca.key": 0o600, "admin.kubeconfig": 0o600, "ca.crt": 0o644} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", name, st.Mode(), err)
		}
	}
}
