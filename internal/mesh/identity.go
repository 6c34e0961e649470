package mesh

import (
	"fmt"
	"strings"
)

// DefaultTrustDomain is the trust domain of a mesh that was not given another.
const DefaultTrustDomain = "cluster.local"

// Identity names a workload by its trust domain, namespace and service account; its text form is the SPIFFE ID
// that Istio's certificates carry (https://spiffe.io/docs/latest/spiffe-specs/spiffe-id/). The zero value is "no
// identity": the peer was not authenticated.
type Identity struct {
	TrustDomain    string
	Namespace      string
	ServiceAccount string
}

// IsZero tells whether there is no identity.
func (i Identity) IsZero() bool { return i == Identity{} }

// String is the SPIFFE ID, or "" for the zero value.
func (i Identity) String() string {
	if i.IsZero() {
		return ""
	}
	return "spiffe://" + i.Principal()
}

// Principal is the SPIFFE ID without its scheme, the form policies match on, or "" for the zero value.
func (i Identity) Principal() string {
	if i.IsZero() {
		return ""
	}
	return i.TrustDomain + "/ns/" + i.Namespace + "/sa/" + i.ServiceAccount
}

// ParseIdentity reads a SPIFFE ID of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>.
func ParseIdentity(id string) (Identity, error) {
	rest, ok := strings.CutPrefix(id, "spiffe://")
	parts := strings.Split(rest, "/")
	if !ok || len(parts) != 5 || parts[1] != "ns" || parts[3] != "sa" || parts[0] == "" || parts[2] == "" || parts[4] == "" {
		return Identity{}, fmt.Errorf("parse identity %q: want spiffe://<trust domain>/ns/<namespace>/sa/<service account>", id)
	}
	return Identity{TrustDomain: parts[0], Namespace: parts[2], ServiceAccount: parts[4]}, nil
}
