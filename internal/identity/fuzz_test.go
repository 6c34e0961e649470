package identity

import (
	"testing"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// FuzzSigningRequest: what a caller asks the certificate authority to sign is refused, or its signature holds.
func FuzzSigningRequest(f *testing.F) {
	_, text, err := newSigningRequest(mesh.Identity{TrustDomain: "cluster.local", Namespace: "a", ServiceAccount: "b"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add("-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n")
	f.Fuzz(func(t *testing.T, text string) {
		csr, err := parseSigningRequest(text)
		if err == nil && csr.CheckSignature() != nil {
			t.Error("accepted without a signature that holds")
		}
	})
}

// FuzzReply: what an authority answers is refused, or there is a chain to show and a root to trust.
func FuzzReply(f *testing.F) {
	f.Add("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n", "")
	f.Fuzz(func(t *testing.T, first, second string) {
		for _, reply := range [][]string{{first}, {first, second}} {
			chain, roots, err := parseReply(reply)
			if err == nil && (len(chain) == 0 || len(roots) == 0) {
				t.Errorf("accepted with %d in the chain and %d roots", len(chain), len(roots))
			}
			for _, c := range chain {
				_, _ = identityOf(c)
			}
		}
	})
}
