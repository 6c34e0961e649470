package translate

import (
	"strings"
	"testing"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/fairlead-mesh/fairlead/internal/kubedir"
)

func TestAuthorization(t *testing.T) {
	goldens(t, "authorization", func(t *testing.T, in *kubedir.Dir) string {
		var b strings.Builder
		for _, p := range list(t, in, &securityv1.AuthorizationPolicy{}) {
			r := Authorization(testMesh, p)
			switch {
			case r.Policy != nil:
				printPolicy(&b, r.Policy, r.Selector)
			case r.Invalid:
				b.WriteString("invalid " + p.Namespace + "/" + p.Name + "\n")
			default:
				b.WriteString("not for ztunnel " + p.Namespace + "/" + p.Name + "\n")
			}
			printCondition(&b, r.Condition)
		}
		return b.String()
	})
}
