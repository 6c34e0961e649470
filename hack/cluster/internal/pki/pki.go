// Package pki (decisions) makes what kubeadm would: a certificate authority, the
// certificates of the control plane and a kubeconfig for each client.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// Request says for which cluster the files are made.
type Request struct {
	Cluster   string       // name of the cluster and context in the kubeconfigs
	Server    netip.Addr   // where clients reach the API server, port 6443
	Addresses []netip.Addr // all addresses the API server's certificate is for
	Nodes     []string     // node names; each gets a kubelet's kubeconfig
	Now       time.Time
}

const validFor = 365 * 24 * time.Hour

// Make returns the files by name: ca.crt, ca.key, sa.key, sa.pub, NAME.crt and
// NAME.key of each certificate, and NAME.kubeconfig of each client.
func Make(r Request) (map[string][]byte, error) {
	a, err := newAuthority(r.Now)
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{"ca.crt": a.certPEM}
	if files["ca.key"], err = encodeKey(a.key); err != nil {
		return nil, err
	}
	if err := addServiceAccountKey(files); err != nil {
		return nil, err
	}
	server := certificate{name: "apiserver", user: "kube-apiserver", addrs: r.Addresses, usage: x509.ExtKeyUsageServerAuth,
		hosts: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}}
	plain := []certificate{server,
		{name: "apiserver-kubelet-client", user: "kube-apiserver-kubelet-client", group: "system:masters"},
		{name: "front-proxy-client", user: "front-proxy-client"},
	}
	clients := []certificate{
		{name: "admin", user: "kubernetes-admin", group: "system:masters"},
		{name: "controller-manager", user: "system:kube-controller-manager"},
		{name: "scheduler", user: "system:kube-scheduler"},
		{name: "kube-proxy", user: "system:kube-proxy"},
	}
	for _, n := range r.Nodes {
		clients = append(clients, certificate{name: n, user: "system:node:" + n, group: "system:nodes"})
	}
	for _, c := range append(plain, clients...) {
		if err := a.issue(files, c); err != nil {
			return nil, fmt.Errorf("issuing %s: %w", c.name, err)
		}
	}
	for _, c := range clients {
		files[c.name+".kubeconfig"] = kubeconfig(r, a.certPEM, c, files)
	}
	return files, nil
}

// Write puts the files into dir; private ones are readable by their owner only.
func Write(dir string, files map[string][]byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, b := range files {
		mode := os.FileMode(0o600)
		if ext := filepath.Ext(name); ext == ".crt" || ext == ".pub" {
			mode = 0o644
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, mode); err != nil {
			return err
		}
	}
	return nil
}

type certificate struct {
	name, user, group string
	hosts             []string
	addrs             []netip.Addr
	usage             x509.ExtKeyUsage // client when it is the zero value
}

type authority struct {
	cert     *x509.Certificate
	certPEM  []byte
	key      *ecdsa.PrivateKey
	from, to time.Time
	serial   int64
}

func newAuthority(now time.Time) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	// An hour back: clocks of a machine's namespaces agree, a person's laptop may not.
	a := &authority{key: key, from: now.Add(-time.Hour), to: now.Add(validFor), serial: 1}
	t := &x509.Certificate{SerialNumber: big.NewInt(a.serial), Subject: pkix.Name{CommonName: "fairlead-lab"}, NotBefore: a.from, NotAfter: a.to,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature | x509.KeyUsageCRLSign}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	a.certPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return a, nil
}

func (a *authority) issue(files map[string][]byte, c certificate) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if c.usage == x509.ExtKeyUsageAny {
		c.usage = x509.ExtKeyUsageClientAuth
	}
	a.serial++
	t := &x509.Certificate{SerialNumber: big.NewInt(a.serial), Subject: pkix.Name{CommonName: c.user}, NotBefore: a.from, NotAfter: a.to,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{c.usage}, DNSNames: c.hosts}
	if c.group != "" {
		t.Subject.Organization = []string{c.group}
	}
	for _, addr := range c.addrs {
		t.IPAddresses = append(t.IPAddresses, addr.AsSlice())
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, key.Public(), a.key)
	if err != nil {
		return err
	}
	files[c.name+".crt"] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	files[c.name+".key"], err = encodeKey(key)
	return err
}

func addServiceAccountKey(files map[string][]byte) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if files["sa.key"], err = encodeKey(key); err != nil {
		return err
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	files["sa.pub"] = pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub})
	return nil
}

func encodeKey(k *ecdsa.PrivateKey) ([]byte, error) {
	b, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: b}), nil
}

func kubeconfig(r Request, ca []byte, c certificate, files map[string][]byte) []byte {
	e := base64.StdEncoding.EncodeToString
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters:
- name: %[1]s
  cluster: {server: "https://%[2]s", certificate-authority-data: %[3]s}
users:
- name: %[4]s
  user: {client-certificate-data: %[5]s, client-key-data: %[6]s}
contexts:
- name: %[1]s
  context: {cluster: %[1]s, user: %[4]s}
current-context: %[1]s
`, r.Cluster, netip.AddrPortFrom(r.Server, 6443), e(ca), c.name, e(files[c.name+".crt"]), e(files[c.name+".key"]))
}
