package main

import (
	"bytes"
	"context"
	"crypto/x509"
	_ "embed"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"text/template"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

//go:embed envoy.yaml.tmpl
var envoyConfig string

// envoy starts an Envoy in each pod of a lane, as an HBONE client and server, with the identities that a mesh would give
// and as many threads as there are CPUs.
func envoy(ctx context.Context, l *lane, binary string, threads int) error {
	config, err := template.New("envoy.yaml").Parse(envoyConfig)
	if err != nil {
		return err
	}
	authority, err := identity.NewSelfSigned(mesh.DefaultTrustDomain, 0)
	if err != nil {
		return err
	}
	for _, r := range roles {
		p := l.pods[r]
		file, err := envoyFiles(ctx, l, r, authority, config)
		if err != nil {
			return fmt.Errorf("configure Envoy: %w", err)
		}
		if err := istioRules(p.ns); err != nil {
			return err
		}
		own, err := l.group.child("envoy-" + string(r))
		if err != nil {
			return err
		}
		started, err := command{
			name: "envoy in " + string(r), ns: p.ns, group: own, spawn: l.spawn, log: filepath.Join(l.dir, "envoy-"+string(r)+".log"),
			argv: []string{binary, "-c", file, "--concurrency", strconv.Itoa(threads), "--disable-hot-restart", "--log-level", "warning"},
		}.start()
		if err != nil {
			return err
		}
		l.close = append(l.close, func() error { started.stop(); return nil })
		l.proxies = append(l.proxies, &proxy{process: started, pods: []role{r}})
		if err := awaitReady(ctx, started, "http://127.0.0.1:15000/ready"); err != nil {
			return err
		}
	}
	return nil
}

// envoyFiles writes a pod's certificate, key, roots and configuration, and returns the latter's path.
func envoyFiles(ctx context.Context, l *lane, r role, authority *identity.SelfSigned, config *template.Template) (string, error) {
	id := mesh.Identity{TrustDomain: mesh.DefaultTrustDomain, Namespace: "default", ServiceAccount: string(r)}
	bundle, err := authority.Fetch(ctx, id)
	if err != nil {
		return "", err
	}
	key, err := x509.MarshalPKCS8PrivateKey(bundle.Certificate.PrivateKey)
	if err != nil {
		return "", err
	}
	path := func(ext string) string { return filepath.Join(l.dir, "envoy-"+string(r)+ext) }
	var text bytes.Buffer
	err = config.Execute(&text, map[string]string{"Certificate": path(".crt"), "Key": path(".key"), "Root": path(".root")})
	if err != nil {
		return "", err
	}
	for _, f := range []struct {
		ext     string
		content []byte
	}{
		{".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: bundle.Certificate.Certificate[0]})},
		{".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})},
		{".root", []byte(authority.RootPEM())},
		{".yaml", text.Bytes()},
	} {
		if err := os.WriteFile(path(f.ext), f.content, 0o600); err != nil {
			return "", err
		}
	}
	return path(".yaml"), nil
}
